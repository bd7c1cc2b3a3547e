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

// The key of a value, or kNoKey where its byte of the mask is 0; without a branch.
EK_HD unsigned key_where(unsigned bits, unsigned valid, int byte) {
  return key_of(bits) & (0u - ((valid & 0xffu << 8 * byte) != 0));
}

// Bytes of a mask at an address for four.
EK_HD unsigned four_bytes(uint8_t const* mask) {
  unsigned four;
  memcpy(&four, __builtin_assume_aligned(mask, sizeof four), sizeof four);
  return four;
}

// Four consecutive keys from `at` on, at any address.
EK_DEVICE void load_keys(Values const& values, int64_t at, unsigned (&key)[4]) {
  bool const whole = at + 4 <= values.count;
  float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
  unsigned valid = 0x01010101u;
  if (whole && aligned(values.value + at, sizeof x)) {
    x = *reinterpret_cast<float4 const*>(values.value + at);
  } else {
    if (at < values.count) x.x = values.value[at];
    if (at + 1 < values.count) x.y = values.value[at + 1];
    if (at + 2 < values.count) x.z = values.value[at + 2];
    if (whole) x.w = values.value[at + 3];
  }
  if (whole && values.mask != nullptr && aligned(values.mask + at, sizeof valid)) {
    valid = four_bytes(values.mask + at);
  } else if (!whole || values.mask != nullptr) {
    valid = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (at + j < values.count && (values.mask == nullptr || values.mask[at + j] != 0))
        valid |= 1u << 8 * j;
  }
  float const each[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) key[j] = key_where(__float_as_uint(each[j]), valid, j);
}

// Four bytes of the mask of what is selected. kAligned: at an address for that, and none of those
// of a group that the end cuts.
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
    int const cut = count_ / 4 * 4, past = first + rounds * kRound, end = past < cut ? past : cut;
    unsigned valid[kHeld];
    // All loads first, so that they are in flight together.
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      int const at = first_ + i * kRound;
      float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
      valid[i] = at < end ? 0x01010101u : 0;
      if (at < end) x = *reinterpret_cast<float4 const*>(values.value + at);
      if (at < end && values.mask != nullptr) valid[i] = four_bytes(values.mask + at);
      held_[i][0] = __float_as_uint(x.x), held_[i][1] = __float_as_uint(x.y);
      held_[i][2] = __float_as_uint(x.z), held_[i][3] = __float_as_uint(x.w);
    }
#pragma unroll
    for (int i = 0; i < 4 * kHeld; ++i)
      held_[i / 4][i % 4] = key_where(held_[i / 4][i % 4], valid[i / 4], i % 4);
    has_cut_ = cut < count_ && first <= cut && cut < first + rounds * kRound;
    cut_at_ = threadIdx.x % 32 == 0 ? cut : count_;
    if (has_cut_) load_keys(values, cut_at_, cut_);
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
      load_keys(values_, at, key);
      f(key, at, std::false_type{});
    }
  }

 private:
  Values const& values_;
  int64_t first_;
  int rounds_;
};

}  // namespace ek
