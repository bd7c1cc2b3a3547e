#pragma once

#include <cstdint>

namespace entropy_kernels {

// One digit of a 32-bit key: `bits` bits above `shift`, counted over the keys whose top
// `prefix_bits` bits equal `prefix`.
struct RadixDigit {
  std::uint32_t prefix;
  int prefix_bits;
  int shift;
  int bits;
};

// counts[d] += how many valid values carry digit d. values: n fp32; mask: n bytes, non-zero is
// valid, or nullptr for all; counts: 1 << bits, added to. Keys order like the numbers: -0 equals
// +0, and a NaN of either sign ranks above +inf.
void radix_histogram(const float* values, const std::uint8_t* mask, std::int64_t n,
                     RadixDigit digit, std::int64_t* counts);

}  // namespace entropy_kernels
