// Keys of fp32 values, unsigned integers of the same order, as `_torch/selection.py` has them.
#pragma once
#include <cstdint>

#include "kernel.h"
#include "launch.h"

namespace ek {

constexpr unsigned kSign = 0x80000000u;
constexpr unsigned kInfinity =
    0x7f800000u;  // the bits of +inf; a NaN's are above, but for its sign
// Of what is masked or past the end: below the key of -inf.
constexpr unsigned kNoKey = 0;

// -0 equals +0, and every NaN is above +inf.
EK_HD unsigned key_of(unsigned bits) {
  if (bits == kSign) bits = 0;
  if ((bits & ~kSign) > kInfinity) return 0xffffffffu;
  return bits & kSign ? ~bits : bits | kSign;
}

EK_HD unsigned bits_of_key(unsigned key) { return key & kSign ? key & ~kSign : ~key; }

// k = ceil(share n), at least 1 where n >= 1 and 0 where n = 0; `share` is the `exact_share`.
EK_HD int64_t selected_count(int64_t n, double share) {
  int64_t const k = static_cast<int64_t>(ceil(static_cast<double>(n) * share));
  return k < 1 ? (n < 1 ? n : 1) : (n < k ? n : k);
}

// Four consecutive keys from `at` on.
EK_DEVICE void load_keys(Values const& values, int64_t at, unsigned (&key)[4]) {
  bool const whole = at + 4 <= values.count;
  float x[4] = {};
  uint8_t valid[4] = {};
  if (whole && reinterpret_cast<uintptr_t>(values.value + at) % sizeof(float4) == 0) {
    auto const four = *reinterpret_cast<float4 const*>(values.value + at);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at + j < values.count) x[j] = values.value[at + j];
  }
  if (values.mask == nullptr) {
#pragma unroll
    for (int j = 0; j < 4; ++j) valid[j] = at + j < values.count;
  } else if (whole && reinterpret_cast<uintptr_t>(values.mask + at) % sizeof(uchar4) == 0) {
    auto const four = *reinterpret_cast<uchar4 const*>(values.mask + at);
    valid[0] = four.x, valid[1] = four.y, valid[2] = four.z, valid[3] = four.w;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at + j < values.count) valid[j] = values.mask[at + j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) key[j] = valid[j] ? key_of(__float_as_uint(x[j])) : kNoKey;
}

constexpr int kRound = 128;  // keys of a warp at once: four consecutive ones per lane

// The keys of a warp, `rounds` times kRound from `first` on. Up to kHeld rounds stay in registers;
// with kHeld = 0 every pass reads them again.
template <int kHeld>
class Keys {
 public:
  EK_DEVICE Keys(Values const& values, int64_t first, int rounds)
      : first_(first + threadIdx.x % 32 * 4), rounds_(rounds) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < rounds) load_keys(values, first_ + i * kRound, held_[i]);
  }

  // Calls f(four keys, where the first of them is), in the same order in all lanes.
  template <class F>
  EK_DEVICE void each(F f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < rounds_) f(held_[i], first_ + i * kRound);
  }

 private:
  int64_t first_;
  int rounds_;
  unsigned held_[kHeld][4];
};

template <>
class Keys<0> {
 public:
  EK_DEVICE Keys(Values const& values, int64_t first, int rounds)
      : values_(values), first_(first + threadIdx.x % 32 * 4), rounds_(rounds) {}

  template <class F>
  EK_DEVICE void each(F f) const {
#pragma unroll 2
    for (int i = 0; i < rounds_; ++i) {
      unsigned key[4];
      load_keys(values_, first_ + static_cast<int64_t>(i) * kRound, key);
      f(key, first_ + static_cast<int64_t>(i) * kRound);
    }
  }

 private:
  Values const& values_;
  int64_t first_;
  int rounds_;
};

}  // namespace ek
