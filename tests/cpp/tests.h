#pragma once

#include "head.h"
#include "report.h"

// Every instruction set and option against fp64.
void test_values(entropy_kernels::Dtype dtype, Report& report);
void test_bounds(Report& report);     // wrong kernels do not pass them
void test_same_bits(Report& report);  // twice, by kept logits; by threads nearly
void test_poisoned_token(Report& report);
void test_poisoned_column(Report& report);
void test_poisoned_gradient(Report& report);
void test_radix_histogram(Report& report);
void test_ratio_loss(Report& report);
