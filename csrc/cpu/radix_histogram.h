// A step of an exact selection: counts the values by one digit of their order.
#pragma once

#include <cstdint>

namespace entropy_kernels {

// A digit of a 32-bit key: the `bits` bits above `shift`. Only keys whose top `prefix_bits` bits
// equal `prefix` are counted.
struct RadixDigit {
  std::uint32_t prefix;
  int prefix_bits;
  int shift;
  int bits;
};

// Adds to counts[d], d < 2^bits, how many of the n values are valid and have digit d. `mask` is
// non-zero for valid values, or nullptr if all are valid. Keys order like the values: -0 equals +0,
// and a NaN of either sign ranks above +inf.
void radix_histogram(const float* values, const std::uint8_t* mask, std::int64_t n,
                     RadixDigit digit, std::int64_t* counts);

}  // namespace entropy_kernels
