// Products of small blocks with the columns in the vector lanes:
//   c[r][lane] += sum_k a(r, k) b[k][lane]
// A unit is one fp32, or two bf16 that are neighbours along k.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace EK_ISA {

constexpr int kPanel = 64;  // columns of a packed panel
constexpr int kRows = 6;    // rows held in registers
// Vectors per row: sums take 24 of 32 registers, or 12 of 16.
#if defined(__AVX512F__) || defined(EK_NEON)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
// Units that are summed before they are added to c. Short chains round less, and so many rows of a
// panel, 32 KB, stay in the L1 cache.
constexpr int kChain = 128;

static inline std::int64_t ceil_div(std::int64_t x, std::int64_t by) { return (x + by - 1) / by; }

static inline std::int64_t round_up(std::int64_t x, std::int64_t to) {
  return ceil_div(x, to) * to;
}

struct F32 {
  using Unit = float;
  static constexpr int kWidth = 1;  // values per unit
  using Operand = Vec;
  static inline Operand operand(const Unit* p) { return load(p); }
  static inline Operand broadcast(const Unit* p) { return splat(*p); }
  static inline Vec madd(Vec acc, Operand a, Operand b) { return acc + a * b; }
};

#ifdef EK_BF16
struct BF16 {
  using Unit = std::uint32_t;
  static constexpr int kWidth = 2;
  using Operand = Pairs;
  static inline Operand operand(const Unit* p) { return load_pairs(p); }
  static inline OnePair broadcast(const Unit* p) { return splat_pair(p); }
  static inline Vec madd(Vec acc, OnePair a, Operand b) { return add_products(acc, a, b); }
};
#endif

// Sets a thread up for products of E, and cleans up after them; tiles.h alone has to.
template <class E>
struct Ready {};

// The units that hold `values` values along k.
template <class E>
static inline std::int64_t units_of(std::int64_t values) {
  return ceil_div(values, E::kWidth);
}

// The left operand: a(r, k) = data[r * row_stride + k * unit_stride], where one stride is 1.
template <class E>
struct Left {
  const typename E::Unit* data;
  std::int64_t row_stride, unit_stride;
};

template <class E, int R, bool kAdd, bool kAlong>
static inline void micro(Left<E> a, const typename E::Unit* b, int units, float* c,
                         std::int64_t c_stride) {
  const std::int64_t row_stride = kAlong ? a.row_stride : 1;
  const std::int64_t unit_stride = kAlong ? 1 : a.unit_stride;
  Vec acc[R][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[r][j] = Vec{};
  for (int k = 0; k < units; ++k) {
    typename E::Operand right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      right[j] = E::operand(b + std::int64_t(k) * kPanel + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto left = E::broadcast(a.data + r * row_stride + k * unit_stride);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[r][j] = E::madd(acc[r][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* p = c + r * c_stride + j * kLanes;
      store(p, kAdd ? load(p) + acc[r][j] : acc[r][j]);
    }
}

template <class E, bool kAdd, bool kAlong>
static void micro_rows(int rows, Left<E> a, const typename E::Unit* b, int units, float* c,
                       std::int64_t c_stride) {
  for (int column = 0; column < kPanel; column += kVectors * kLanes) {
    const auto* bc = b + column;
    float* cc = c + column;
    switch (rows) {
      case 1: micro<E, 1, kAdd, kAlong>(a, bc, units, cc, c_stride); break;
      case 2: micro<E, 2, kAdd, kAlong>(a, bc, units, cc, c_stride); break;
      case 3: micro<E, 3, kAdd, kAlong>(a, bc, units, cc, c_stride); break;
      case 4: micro<E, 4, kAdd, kAlong>(a, bc, units, cc, c_stride); break;
      case 5: micro<E, 5, kAdd, kAlong>(a, bc, units, cc, c_stride); break;
      default: micro<E, 6, kAdd, kAlong>(a, bc, units, cc, c_stride); break;
    }
  }
}

template <class E, bool kAlong>
static void strided_product(std::int64_t rows, Left<E> a, const typename E::Unit* b,
                            std::int64_t units, float* c, std::int64_t c_stride, bool add) {
  for (std::int64_t k = 0; k < units || k == 0; k += kChain) {
    const int length = int(std::min<std::int64_t>(kChain, units - k));
    for (std::int64_t r = 0; r < rows; r += kRows) {
      const int count = int(std::min<std::int64_t>(kRows, rows - r));
      const Left<E> part{a.data + r * a.row_stride + k * a.unit_stride, a.row_stride,
                         a.unit_stride};
      if (add || k > 0)
        micro_rows<E, true, kAlong>(count, part, b + k * kPanel, length, c + r * c_stride,
                                    c_stride);
      else
        micro_rows<E, false, kAlong>(count, part, b + k * kPanel, length, c + r * c_stride,
                                     c_stride);
    }
  }
}

// c[rows, kPanel] (+)= a[rows, units] b[units, kPanel].
template <class E>
static void product(std::int64_t rows, Left<E> a, const typename E::Unit* b, std::int64_t units,
                    float* c, std::int64_t c_stride, bool add) {
  if (a.unit_stride == 1)
    strided_product<E, true>(rows, a, b, units, c, c_stride, add);
  else
    strided_product<E, false>(rows, a, b, units, c, c_stride, add);
}

}  // namespace EK_ISA
