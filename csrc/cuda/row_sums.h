// Sums over a row of logits: column by column, tile by tile, merged at the end. The same numbers
// as in the Triton kernels' row_sum_functions.py and statistics_functions.py, which say what they
// are for: fp32, relative to the largest logit m so far, and in units of log2.
//
// T tokens, S vocabulary splits.
#pragma once
#include "logits.h"

namespace ek {

// With d = (z - m) log2(e) / temperature. Only kStatistics sums w, q and r.
struct RowSums {
  float m = kLowest;  // the largest logit
  float n = 0.0f;     // columns that hold it
  float s = 0.0f;     // sum of 2^d over the others
  float u = 0.0f;     // sum of d 2^d
  float w = 0.0f;     // sum of d^2 2^d
  float q = 0.0f;     // sum of 2^(2 d) over all but those that hold m
  float r = 0.0f;     // sum of d 2^(2 d)
};

// The same columns, relative to top >= sums.m. scale: log2(e) / temperature.
template <bool kStatistics>
EK_HD RowSums moved(RowSums const& sums, float top, float scale) {
  float const distance = (sums.m - top) * scale;
  float const a = exp2_approx(distance);
  float const shift = larger(kLowestExponent, distance);
  float const total = sums.s + sums.n;
  bool const stays = sums.m == top;
  RowSums to;
  to.m = top;
  to.n = stays ? sums.n : 0.0f;
  to.s = stays ? sums.s : a * total;
  to.u = a * (sums.u + total * shift);
  if constexpr (kStatistics) {
    float const squares = sums.q + sums.n;
    to.w = a * (sums.w + shift * (2.0f * sums.u + total * shift));
    to.q = stays ? sums.q : a * a * squares;
    to.r = a * a * (sums.r + squares * shift);
  }
  return to;
}

// Both sets of columns.
template <bool kStatistics>
EK_HD RowSums merged(RowSums const& first, RowSums const& second, float scale) {
  float const top = larger(first.m, second.m);
  RowSums to = moved<kStatistics>(first, top, scale);
  RowSums const other = moved<kStatistics>(second, top, scale);
  to.n += other.n;
  to.s += other.s;
  to.u += other.u;
  if constexpr (kStatistics) {
    to.w += other.w;
    to.q += other.q;
    to.r += other.r;
  }
  return to;
}

// One more column, whose logit is at most sums.m. A NaN or an infinity makes s NaN: no maximum sees
// a NaN.
template <bool kStatistics>
EK_HD void add_column(RowSums& sums, float z, float scale) {
  float const d = (z - sums.m) * scale;
  float const e = exp2_approx(d);
  // Unclamped, a logit of -inf would give 0 * -inf. e is NaN where d is.
  float const near = larger(kLowestExponent, d);
  bool const tie = d == 0.0f;
  if (tie)
    sums.n += 1.0f;
  else
    sums.s += e;
  sums.u += e * near;
  if constexpr (kStatistics) {
    float const square = tie ? 0.0f : e * e;
    sums.w += e * (near * near);
    sums.q += square;
    sums.r += square * near;
  }
}

// Where partials [4 or 7, S, T] have field 0 of a row; the next field follows splits * rows later.
EK_HD int64_t partial_of(int split, int row, int rows) { return int64_t(split) * rows + row; }

template <bool kStatistics>
EK_HD void store_sums(float* partials, int split, int splits, int row, int rows,
                      RowSums const& sums) {
  float* out = partials + partial_of(split, row, rows);
  int64_t const field = int64_t(splits) * rows;
  out[0] = sums.m;
  out[field] = sums.n;
  out[2 * field] = sums.s;
  out[3 * field] = sums.u;
  if constexpr (kStatistics) {
    out[4 * field] = sums.w;
    out[5 * field] = sums.q;
    out[6 * field] = sums.r;
  }
}

template <bool kStatistics>
EK_HD RowSums load_sums(float const* partials, int split, int splits, int row, int rows) {
  float const* in = partials + partial_of(split, row, rows);
  int64_t const field = int64_t(splits) * rows;
  RowSums sums{in[0], in[field], in[2 * field], in[3 * field]};
  if constexpr (kStatistics) {
    sums.w = in[4 * field];
    sums.q = in[5 * field];
    sums.r = in[6 * field];
  }
  return sums;
}

}  // namespace ek
