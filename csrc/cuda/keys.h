// Keys of fp32 values, unsigned integers of the same order, as `_torch/selection.py` has them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

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
  unsigned key = bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | kSign);
  key += key == ~kSign;
  return (bits & ~kSign) > kInfinity ? 0xffffffffu : key;
}

EK_HD unsigned bits_of_key(unsigned key) { return key & kSign ? key & ~kSign : ~key; }

// k = ceil(share n), at least 1 where n >= 1 and 0 where n = 0; `share` is the `exact_share`.
EK_HD int64_t selected_count(int64_t n, double share) {
  int64_t const k = static_cast<int64_t>(ceil(static_cast<double>(n) * share));
  return k < 1 ? (n < 1 ? n : 1) : (n < k ? n : k);
}

template <class T>
EK_HD bool aligned(T const* from, size_t bytes) {
  return reinterpret_cast<uintptr_t>(from) % bytes == 0;
}

// Four consecutive keys from `at` on. kAligned: values and mask begin at addresses for that, and a
// group that the end cuts has no keys.
template <bool kAligned>
EK_DEVICE void load_keys(Values const& values, int64_t at, unsigned (&key)[4]) {
  bool const whole = at + 4 <= values.count;
  float x[4] = {};
  unsigned valid = 0;  // a byte per value
  if (whole && (kAligned || aligned(values.value + at, sizeof(float4)))) {
    auto const four = *reinterpret_cast<float4 const*>(values.value + at);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    valid = 0x01010101u;
  } else if (!kAligned) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at + j < values.count) x[j] = values.value[at + j], valid |= 1u << 8 * j;
  }
  if (values.mask != nullptr) {
    if (whole && (kAligned || aligned(values.mask + at, sizeof valid))) {
      memcpy(&valid, __builtin_assume_aligned(values.mask + at, sizeof valid), sizeof valid);
    } else if (!kAligned) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (at + j < values.count && values.mask[at + j] == 0) valid &= ~(1u << 8 * j);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    key[j] = valid & 0xffu << 8 * j ? key_of(__float_as_uint(x[j])) : kNoKey;
}

// The same of a mask of what is selected.
template <bool kAligned>
EK_DEVICE void store_selected(uint8_t* selected, int64_t at, int64_t count, bool const (&kept)[4]) {
  bool const whole = at + 4 <= count;
  if (whole && (kAligned || aligned(selected + at, sizeof(uchar4)))) {
    *reinterpret_cast<uchar4*>(selected + at) = {kept[0], kept[1], kept[2], kept[3]};
  } else if (!kAligned) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at + j < count) selected[at + j] = kept[j];
  }
}

constexpr int kRound = 128;  // keys of a warp at once: four consecutive ones per lane

// The keys of a warp, `rounds` times kRound from `first` on. kHeld rounds at most stay in
// registers, and all pointers are aligned; with kHeld = 0 every pass reads its keys again, from any
// address.
template <int kHeld>
class Keys {
 public:
  EK_DEVICE Keys(Values const& values, int first, int rounds)
      : count_(static_cast<int>(values.count)), first_(first + threadIdx.x % 32 * 4),
        rounds_(rounds) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < rounds) load_keys<true>(values, first_ + i * kRound, held_[i]);
    int const cut = count_ / 4 * 4;
    has_cut_ = cut < count_ && first <= cut && cut < first + rounds * kRound;
    cut_at_ = threadIdx.x % 32 == 0 ? cut : count_;
    if (has_cut_) load_keys<false>(values, cut_at_, cut_);
  }

  // Calls f(four keys, where the first of them is, whether as aligned ones), in the same order in
  // all lanes. The group that the end cuts is the last of its warp.
  template <class F>
  EK_DEVICE void each(F f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i < rounds_) f(held_[i], first_ + i * kRound, std::true_type{});
    if (has_cut_) f(cut_, cut_at_, std::false_type{});
  }

 private:
  int count_, first_, cut_at_, rounds_;
  bool has_cut_;
  unsigned held_[kHeld][4];
  unsigned cut_[4] = {};
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
      int64_t const at = first_ + static_cast<int64_t>(i) * kRound;
      load_keys<false>(values_, at, key);
      f(key, at, std::false_type{});
    }
  }

 private:
  Values const& values_;
  int64_t first_;
  int rounds_;
};

}  // namespace ek
