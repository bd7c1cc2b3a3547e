// What one thread of sm_100 does with its row of a tile: tensor memory has a row per lane, so
// nothing crosses threads. The columns come in chunks, as many as registers hold. No tensor memory
// here: a host compiler takes the same text.
//
// T tokens, V vocabulary, S vocabulary splits.
#pragma once
#include "launch.h"
#include "row_sums.h"
#include "tile_order.h"

namespace ek {

constexpr int kRowColumns = 256;  // of a tile, which is one split
constexpr int kChunk = 64;

// 1 or 0, but a compiler takes it for any number. A loop that runs so often stays behind its
// branch; of an if, ptxas has every tile execute the body under a predicate that is false.
EK_HD int once_if(bool condition) {
  int times = condition;
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(times));
#endif
  return times;
}

template <bool kStatistics>
class RowTile {
 public:
  // A row of Head, and the tile's first column.
  EK_HD RowTile(Head const& head, Forward const& out, int row, int start)
      : head_(head), out_(out), row_(row), start_(start) {
    valid_ = row < RowRange{nullptr, out.number, head.rows}.end();
    int64_t const target = valid_ ? out.target[row] : -1;
    target_ = target < head.vocabulary ? target : -1;
    scale_ = kLog2e;
    if (valid_) scale_ *= inverse_temperature(head.temperature, head.stride_temperature, row);
  }

  // One more chunk: its products, and its first column. z becomes logits.
  EK_HD void add(float (&z)[kChunk], int first) {
    int const columns = head_.vocabulary - first;
    if (out_.logits != nullptr && valid_) keep(z, first, columns);
    if (head_.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) z[j] += j < columns ? bf16_at(head_.bias, first + j) : 0.0f;
    }
#pragma unroll 1
    for (int times = once_if(head_.softcap != 0.0f); times > 0; --times) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) z[j] = capped(z[j], head_.softcap);
    }
    int64_t const target = target_ - first;
    if (target >= 0 && target < kChunk) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j == target) out_.target_logit[row_] = z[j];
      }
    }
#pragma unroll 1
    for (int times = once_if(columns < kChunk); times > 0; --times) {
      // Neither the largest, nor in any sum.
#pragma unroll
      for (int j = 0; j < kChunk; ++j) z[j] = j < columns ? z[j] : -INFINITY;
    }
    sums_ = merged<kStatistics>(sums_, sums_of(z), scale_);
  }

  EK_HD void store() const {
    if (!valid_) return;
    store_sums<kStatistics>(out_.partials, start_ / kRowColumns, out_.splits, row_, head_.rows,
                            sums_);
  }

 private:
  EK_HD void keep(float const (&z)[kChunk], int first, int columns) const {
    float* to = out_.logits + int64_t(out_.index[row_]) * head_.vocabulary + first;
    if (columns >= kChunk && reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0) {
#pragma unroll
      for (int j = 0; j < kChunk; j += 4) {
        *reinterpret_cast<float4*>(to + j) = {z[j], z[j + 1], z[j + 2], z[j + 3]};
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j < columns) to[j] = z[j];
    }
  }

  EK_HD RowSums sums_of(float const (&z)[kChunk]) const {
    // Four maxima: one would wait for itself 64 times.
    float top[4] = {z[0], z[1], z[2], z[3]};
#pragma unroll
    for (int j = 4; j < kChunk; ++j) top[j % 4] = larger(top[j % 4], z[j]);
    RowSums sums;
    sums.m = larger(sums.m, larger(larger(top[0], top[1]), larger(top[2], top[3])));
#pragma unroll
    for (int j = 0; j < kChunk; ++j) add_column<kStatistics>(sums, z[j], scale_);
    return sums;
  }

  Head const& head_;
  Forward const& out_;
  int row_;
  int start_;
  bool valid_;
  int64_t target_;  // -1: none
  float scale_;
  RowSums sums_;
};

// The whole row: `load(z, chunk)` brings the products of a chunk of the tile.
template <bool kStatistics, class Load>
EK_HD void row_of_tile(Head const& head, Forward const& out, int row, int start, Load load) {
  RowTile<kStatistics> tile(head, out, row, start);
#pragma unroll 1
  for (int chunk = 0; chunk < kRowColumns / kChunk; ++chunk) {
    float z[kChunk];
    load(z, chunk);
    int const first = start + chunk * kChunk;
    if (first < head.vocabulary) tile.add(z, first);
  }
  tile.store();
}

}  // namespace ek
