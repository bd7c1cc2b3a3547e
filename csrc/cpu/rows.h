// Reading and packing rows of hidden states and weights, in any of the dtypes, as units of E.
#pragma once

#include "head.h"
#include "product.h"

namespace EK_ISA {

using entropy_kernels::Dtype;
using entropy_kernels::Head;
using entropy_kernels::Rows;

static inline std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// `dim` values of one row as units, the last one filled up with zero.
template <class E>
static void read_row(const void* base, std::int64_t offset, std::int64_t dim, Dtype dtype,
                     typename E::Unit* out) {
  const char* row = static_cast<const char*>(base) + offset * bytes_of(dtype);
  if constexpr (E::kWidth == 2) {
    if (dim % 2) out[dim / 2] = 0;
    std::memcpy(out, row, dim * 2);
  } else if (dtype == Dtype::f32) {
    std::memcpy(out, row, dim * 4);
  } else if (dtype == Dtype::f16) {
    widen_f16(row, dim, out);
  } else {
    for (std::int64_t i = 0; i < dim; ++i) {
      std::uint16_t bits;
      std::memcpy(&bits, row + 2 * i, 2);
      out[i] = from_bf16(bits);
    }
  }
}

// Rows as panels of 64 with the rows in the lanes: out[panel][unit of D][lane]. Products of them
// with rows of the weight are logits.
template <class E>
static void pack_rows(const typename E::Unit* const* rows, std::int64_t count, std::int64_t units,
                      typename E::Unit* out) {
  for (std::int64_t lane = 0; lane < kPanel; ++lane)
    for (std::int64_t k = 0; k < units; ++k)
      out[k * kPanel + lane] = lane < count ? rows[lane][k] : typename E::Unit{};
}

// Rows as panels with 64 values of D in the lanes and the rows along k: out[panel][unit of
// rows][lane]; with two values a unit, those of two rows. `rows` are units along D.
template <class E>
static void pack_columns(const typename E::Unit* rows, std::int64_t row_units, std::int64_t count,
                         std::int64_t dim, typename E::Unit* out) {
  const std::int64_t panels = round_up(dim, kPanel) / kPanel;
  const std::int64_t units = round_up(count, E::kWidth) / E::kWidth;
  // Row after row, as they lie in memory.
  for (std::int64_t k = 0; k < units; ++k) {
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      const std::int64_t first = panel * kPanel,
                         width = std::min<std::int64_t>(kPanel, dim - first);
      typename E::Unit* to = out + (panel * units + k) * kPanel;
      if constexpr (E::kWidth == 1) {
        std::memcpy(to, rows + k * row_units + first, width * 4);
      } else {
        const bool both = 2 * k + 1 < count;
        const auto* low = reinterpret_cast<const std::uint16_t*>(rows + 2 * k * row_units) + first;
        const auto* high =
            reinterpret_cast<const std::uint16_t*>(rows + (2 * k + both) * row_units) + first;
        const std::uint32_t keep = both ? 0xffff0000u : 0;
        for (std::int64_t i = 0; i < width; ++i)
          to[i] = low[i] | ((std::uint32_t{high[i]} << 16) & keep);
      }
      for (std::int64_t i = width; i < kPanel; ++i) to[i] = typename E::Unit{};
    }
  }
}

// Rows [first, first + count) of the weight as units along D: in place where they can be read so
// and `copy` does not ask for better, else copied into `scratch`. Products wait for memory row by
// row; a copy reads it in its order.
template <class E>
static Left<E> weight_rows(const Head& head, std::int64_t first, std::int64_t count,
                           typename E::Unit* scratch, bool copy) {
  using Unit = typename E::Unit;
  const std::int64_t units = round_up(head.dim, E::kWidth) / E::kWidth;
  const bool native = (E::kWidth == 2) == (head.dtype == Dtype::bf16) && head.dtype != Dtype::f16;
  if (!copy && native && head.dim % E::kWidth == 0 && head.weight_stride % E::kWidth == 0) {
    const char* base = static_cast<const char*>(head.weight);
    const char* row = base + first * head.weight_stride * bytes_of(head.dtype);
    return {reinterpret_cast<const Unit*>(row), head.weight_stride / E::kWidth, 1};
  }
  for (std::int64_t r = 0; r < count; ++r)
    read_row<E>(head.weight, (first + r) * head.weight_stride, head.dim, head.dtype,
                scratch + r * units);
  return {scratch, units, 1};
}

constexpr int kTileRows = 96;  // rows of the weight a tile of logits

// Logits that are kept lie as they are computed: for each 96 rows of the weight, the last ones
// fewer, the tiles [rows][64] of all panels of tokens. `first` is a tile's first row.
static inline float* kept_tile(const Head& head, std::int64_t first, std::int64_t panel) {
  const std::int64_t panels = round_up(head.tokens, kPanel) / kPanel;
  const std::int64_t height = std::min<std::int64_t>(kTileRows, head.vocabulary - first);
  return head.logits + (first * panels + panel * height) * kPanel;
}

// h W^T + b of `rows` rows of the weight and one panel of hidden states: tile[row][lane].
template <class E>
static void logits_tile(const Head& head, Left<E> weight, std::int64_t first, std::int64_t rows,
                        const typename E::Unit* panel, float* tile) {
  const std::int64_t units = round_up(head.dim, E::kWidth) / E::kWidth;
  product<E>(rows, weight, panel, units, tile, kPanel, false);
  if (head.bias == nullptr) return;
  for (std::int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < kPanel; j += kLanes)
      store(tile + r * kPanel + j, load(tile + r * kPanel + j) + splat(head.bias[first + r]));
}

}  // namespace EK_ISA
