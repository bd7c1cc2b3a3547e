// Rows of hidden states and weights of any dtype, read and packed as units of E; a tile of logits.
#pragma once

#include "head.h"
#include "isa.h"
#include "product.h"
#include "values.h"

namespace EK_ISA {

using entropy_kernels::Head;
using entropy_kernels::Rows;

// Reads `dim` values of one row as units; zero fills the last unit up.
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
    for (std::int64_t i = 0; i < dim; ++i) out[i] = from_bf16(read_as<std::uint16_t>(row + 2 * i));
  }
}

// Packs at most 64 rows as a panel with the rows in the lanes: out[unit of D][lane]. Its products
// with rows of the weight are logits.
template <class E>
static void pack_rows(const typename E::Unit* const* rows, std::int64_t count, std::int64_t units,
                      typename E::Unit* out) {
  for (std::int64_t lane = 0; lane < kPanel; ++lane)
    for (std::int64_t k = 0; k < units; ++k)
      out[k * kPanel + lane] = lane < count ? rows[lane][k] : typename E::Unit{};
}

// Packs rows as panels with 64 values of D in the lanes and the rows along k:
// out[panel][unit of rows][lane]. A unit of two values holds those of two rows. `rows` are units
// along D.
template <class E>
static void pack_columns(const typename E::Unit* rows, std::int64_t row_units, std::int64_t count,
                         std::int64_t dim, typename E::Unit* out) {
  const std::int64_t panels = ceil_div(dim, kPanel);
  const std::int64_t units = units_of<E>(count);
  // In the rows' order in memory.
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
        const std::uint32_t high_bits = both ? 0xffff0000u : 0;
        for (std::int64_t i = 0; i < width; ++i)
          to[i] = low[i] | ((std::uint32_t{high[i]} << 16) & high_bits);
      }
      for (std::int64_t i = width; i < kPanel; ++i) to[i] = typename E::Unit{};
    }
  }
}

// Rows [first, first + count) of the weight as units along D. They stay in place if they are units
// already and `copy` is false; else they are copied into `scratch`. A copy reads memory in its
// order, where products read it row by row and wait.
template <class E>
static Left<E> weight_rows(const Head& head, std::int64_t first, std::int64_t count,
                           typename E::Unit* scratch, bool copy) {
  using Unit = typename E::Unit;
  const std::int64_t units = units_of<E>(head.dim);
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

constexpr int kTileRows = 96;  // rows of the weight in a tile of logits

// The stored logits of the weight's rows from `first` on, for one panel of tokens. They lie in the
// order they are computed in: per 96 rows of the weight, the tiles [rows][64] of all panels.
static inline float* stored_tile(const Head& head, std::int64_t first, std::int64_t panel) {
  const std::int64_t panels = ceil_div(head.tokens, kPanel);
  const std::int64_t height = std::min<std::int64_t>(kTileRows, head.vocabulary - first);
  return head.logits + (first * panels + panel * height) * kPanel;
}

// tile[row][lane] = h W^T + b, for rows of the weight from `first` on and a panel of hidden states.
template <class E>
static void logits_tile(const Head& head, Left<E> weight, std::int64_t first, std::int64_t rows,
                        const typename E::Unit* panel, float* tile) {
  const std::int64_t units = units_of<E>(head.dim);
  product<E>(rows, weight, panel, units, tile, kPanel, false);
  if (head.bias == nullptr) return;
  for (std::int64_t r = 0; r < rows; ++r)
    for (int j = 0; j < kPanel; j += kLanes)
      store(tile + r * kPanel + j, load(tile + r * kPanel + j) + splat(head.bias[first + r]));
}

}  // namespace EK_ISA
