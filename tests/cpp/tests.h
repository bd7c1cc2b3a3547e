// The tests that main.cpp runs.
#pragma once

#include "head.h"
#include "report.h"

// Compares every instruction set and option with fp64.
void test_values(entropy_kernels::Dtype dtype, Report& report);
void test_bounds(Report& report);     // the bounds of test_values fail wrong kernels
void test_same_bits(Report& report);  // in a second run, and with stored logits
void test_poisoned_token(Report& report);
void test_poisoned_column(Report& report);
void test_poisoned_gradient(Report& report);
void test_radix_histogram(Report& report);
void test_ratio_loss(Report& report);
void test_pair_products(Report& report);
void test_row_entropies(Report& report);
