// The forward statistics of a tile of logits, for one thread: what the Triton kernels of forward do
// with a tile once it is multiplied. CuTe alone: a host compiler takes the same text.
#pragma once
#include "fragment.h"
#include "launch.h"
#include "row_sums.h"
#include "tile_order.h"

namespace ek {

constexpr unsigned kWholeWarp = 0xffffffffu;

// An Operation (collective.h): the sums of each row of the tile, its target's logit, and its logits
// where they are kept.
template <bool kStatistics>
struct ForwardTile {
  Head head;
  Forward out;

  // Shared memory that a tile needs where warps share rows.
  template <class Tile, class TiledMma>
  static constexpr int shared_bytes() {
    constexpr int kWarps = kWarpsPerRow<TiledMma>;
    return kWarps == 1 ? 0 : kWarps * decltype(cute::size<0>(Tile{}))::value * sizeof(RowSums);
  }

  template <class Tile, class Engine, class Layout0, class TiledMma>
  EK_DEVICE void operator()(Tile tile, int block, int split, int end,
                            cute::Tensor<Engine, Layout0>& accumulators, TiledMma mma, int thread,
                            void* shared) const {
    int const start_t = block * cute::size<0>(tile);
    int const start_v = split * cute::size<1>(tile);
    auto z = rows_and_columns(accumulators);
    auto const c = coordinates(tile, mma, thread);
    if (out.logits != nullptr) keep_products(z, c, start_t, start_v, end);
    if (head.bias != nullptr) add_bias(z, c, start_v);
    constexpr int kWarps = kWarpsPerRow<TiledMma>;
    auto* const parts = static_cast<RowSums*>(shared);
    if constexpr (kWarps > 1) __syncthreads();  // the main loop's last reads of this memory
    CUTE_UNROLL
    for (int i = 0; i < cute::size<0>(z); ++i) {
      int const row = cute::get<0>(c(i, 0));
      int const t = start_t + row;
      bool const inside = t < end;
      float const scale = scale_of(t, inside);
      finish_row(z, c, i, start_v, cute::size<1>(tile));
      RowSums const sums = sums_of_row(z, i, scale);
      if (inside) store_target(z, c, i, t, start_v, cute::size<1>(tile));
      if (thread % 4 == 0) {
        if constexpr (kWarps > 1)
          parts[warp_of_row(mma, thread) * cute::size<0>(tile) + row] = sums;
        else if (inside)
          store_sums<kStatistics>(out.partials, split, out.splits, t, head.rows, sums);
      }
    }
    if constexpr (kWarps > 1) {
      __syncthreads();
      int const t = start_t + thread;
      if (thread < cute::size<0>(tile) && t < end) {
        RowSums sums = parts[thread];
        CUTE_UNROLL
        for (int warp = 1; warp < kWarps; ++warp)
          sums = merged<kStatistics>(sums, parts[warp * cute::size<0>(tile) + thread],
                                     scale_of(t, true));
        store_sums<kStatistics>(out.partials, split, out.splits, t, head.rows, sums);
      }
    }
  }

 private:
  EK_DEVICE float scale_of(int t, bool inside) const {
    return kLog2e *
           (inside ? inverse_temperature(head.temperature, head.stride_temperature, t) : 1);
  }

  template <class View, class Coordinates>
  EK_DEVICE void keep_products(View const& z, Coordinates const& c, int start_t, int start_v,
                               int end) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size<0>(z); ++i) {
      int const t = start_t + cute::get<0>(c(i, 0));
      if (t >= end) continue;
      float* const to = out.logits + int64_t(out.index[t]) * head.vocabulary + start_v;
      CUTE_UNROLL
      for (int j = 0; j < cute::size<1>(z); ++j) {
        int const column = cute::get<1>(c(0, j));
        if (start_v + column < head.vocabulary) to[column] = z(i, j);
      }
    }
  }

  template <class View, class Coordinates>
  EK_DEVICE void add_bias(View& z, Coordinates const& c, int start_v) const {
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(z); ++j) {
      int const v = start_v + cute::get<1>(c(0, j));
      float const bias = v < head.vocabulary ? bf16_at(head.bias, v) : 0.0f;
      CUTE_UNROLL
      for (int i = 0; i < cute::size<0>(z); ++i) z(i, j) += bias;
    }
  }

  // Caps a row, and leaves -inf past the vocabulary. A row at a time: more of it at once would
  // spill registers.
  template <class View, class Coordinates>
  EK_DEVICE void finish_row(View& z, Coordinates const& c, int i, int start_v, int width) const {
    if (head.softcap != 0.0f) {
      CUTE_UNROLL
      for (int j = 0; j < cute::size<1>(z); ++j) z(i, j) = capped(z(i, j), head.softcap);
    }
    if (start_v + width > head.vocabulary) {
      CUTE_UNROLL
      for (int j = 0; j < cute::size<1>(z); ++j)
        if (start_v + cute::get<1>(c(i, j)) >= head.vocabulary) z(i, j) = -INFINITY;
    }
  }

  // The sums of a row over the columns that the four threads of a quad have of it.
  template <class View>
  EK_DEVICE static RowSums sums_of_row(View const& z, int i, float scale) {
    RowSums sums;
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(z); ++j) sums.m = larger(sums.m, z(i, j));
    CUTE_UNROLL
    for (int lane = 1; lane < 4; lane *= 2)
      sums.m = larger(sums.m, __shfl_xor_sync(kWholeWarp, sums.m, lane));
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(z); ++j) add_column<kStatistics>(sums, z(i, j), scale);
    CUTE_UNROLL
    for (int lane = 1; lane < 4; lane *= 2) {
      sums.n += __shfl_xor_sync(kWholeWarp, sums.n, lane);
      sums.s += __shfl_xor_sync(kWholeWarp, sums.s, lane);
      sums.u += __shfl_xor_sync(kWholeWarp, sums.u, lane);
      if constexpr (kStatistics) {
        sums.w += __shfl_xor_sync(kWholeWarp, sums.w, lane);
        sums.q += __shfl_xor_sync(kWholeWarp, sums.q, lane);
        sums.r += __shfl_xor_sync(kWholeWarp, sums.r, lane);
      }
    }
    return sums;
  }

  // The logit of the row's target, by the one thread that has it.
  template <class View, class Coordinates>
  EK_DEVICE void store_target(View const& z, Coordinates const& c, int i, int t, int start_v,
                              int width) const {
    int64_t const target = out.target[t] - start_v;
    if (target < 0 || target >= width || out.target[t] >= head.vocabulary) return;
    CUTE_UNROLL
    for (int j = 0; j < cute::size<1>(z); ++j)
      if (cute::get<1>(c(i, j)) == int(target)) out.target_logit[t] = z(i, j);
  }
};

}  // namespace ek
