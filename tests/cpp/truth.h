// The head in fp64, and bounds on how far kernels may be from it. The bounds are of first order in
// the magnitudes of the summed terms, so they are small where all terms are small.
#pragma once

#include "problem.h"
#include "report.h"

// Faults that a kernel might have. The truth commits one, so that a correct kernel must fail.
enum class Fault {
  none,
  short_operands,  // 11 significant bits, as TF32 has
  short_logits,    // 11 significant bits
  column_missing,  // the last one
  rounded_dz,      // to bf16
  token_missing,   // the last one, in the weight's gradient
};

// Relative errors of one step.
struct Precision {
  double product;  // of a value in the sums of products
  double dz;       // of dz before its products
};

Precision precision_of(const std::string& isa, Dtype dtype);

// Logits h W^T + b in fp64, and the sums of their terms' magnitudes, [R, V] each.
struct Logits {
  std::vector<double> value, magnitude;
  explicit Logits(const Problem& problem, Fault fault = Fault::none);
};

void compare(const Problem& problem, const Logits& logits, Precision precision, const Outcome& got,
             const std::string& what, Report& report, Fault fault = Fault::none);
