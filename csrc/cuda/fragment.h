// What one thread holds of a tile: its accumulators as rows and columns, and where they are.
#pragma once
#include <cute/tensor.hpp>

#include "kernel.h"

namespace ek {

// mma.sync and wgmma hand out C as ((2 columns, 2 rows, ...), MMA_M, MMA_N). The same registers as
// ((2, MMA_M) rows, (2, ..., MMA_N) columns).
template <class Engine, class Layout0>
EK_HD auto rows_and_columns(cute::Tensor<Engine, Layout0> const& fragment) {
  using cute::get;
  using cute::make_layout;
  auto const l = fragment.layout();
  auto const rows = make_layout(get<0, 1>(l), get<1>(l));
  if constexpr (decltype(cute::rank<0>(l))::value == 3) {  // wgmma: ((2, 2, N / 8), MMA_M, MMA_N)
    return cute::make_tensor(fragment.data(),
                             make_layout(rows, make_layout(get<0, 0>(l), get<0, 2>(l), get<2>(l))));
  } else {  // mma.sync: ((2, 2), MMA_M, MMA_N)
    return cute::make_tensor(fragment.data(),
                             make_layout(rows, make_layout(get<0, 0>(l), get<2>(l))));
  }
}
template <class Engine, class Layout0>
EK_HD auto rows_and_columns(cute::Tensor<Engine, Layout0>& fragment) {
  return rows_and_columns(cute::make_tensor(fragment.data(), fragment.layout()));
}

// (row, column) in the tile of each register of rows_and_columns.
template <class Tile, class TiledMma>
EK_HD auto coordinates(Tile tile, TiledMma mma, int thread) {
  auto const whole = cute::make_identity_tensor(cute::select<0, 1>(tile));
  return rows_and_columns(mma.get_thread_slice(thread).partition_C(whole));
}

// Warps that share a row, and which of them a thread belongs to.
template <class TiledMma>
constexpr int kWarpsPerRow = decltype(cute::size<2>(TiledMma{}.get_thr_layout_vmnk()))::value;

template <class TiledMma>
EK_HD int warp_of_row(TiledMma mma, int thread) {
  return cute::get<2>(mma.get_thr_layout_vmnk().get_flat_coord(thread));
}

}  // namespace ek
