// The head in fp64, and how far kernels may be from it: bounds to first order from the magnitudes
// of what is summed, so that they are as small as the value where all that is summed is small.
#pragma once

#include "problem.h"
#include "report.h"

// What a kernel might do wrong; the truth does it, so that right kernels must fail against it.
enum class Fault {
  none,
  short_operands,  // 11 significant bits, as TF32 has
  short_logits,    // likewise
  column_missing,  // the last one
  rounded_dz,      // to bf16
  token_missing,   // the last one, of the weight's gradient
};

// Relative errors of one step.
struct Precision {
  double product;  // a value's, in the sums of products
  double dz;       // dz's, before its products
};

Precision precision_of(const std::string& isa, Dtype dtype);

// Logits h W^T + b in fp64 and the sums of their terms' magnitudes: [R, V] each.
struct Logits {
  std::vector<double> value, magnitude;
  explicit Logits(const Problem& problem, Fault fault = Fault::none);
};

void compare(const Problem& problem, const Logits& logits, Precision precision, const Outcome& got,
             const std::string& what, Report& report, Fault fault = Fault::none);
