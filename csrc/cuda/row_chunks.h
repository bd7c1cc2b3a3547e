// Where tensor memory has the chunks of a thread's row (sm_100). CuTe alone: a host compiler takes
// the same text.
#pragma once
#include <cute/tensor.hpp>
// After it.
#include <cute/arch/mma_sm100_umma.hpp>
#include <cute/atom/copy_traits_sm100.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm100.hpp>

#include "row_tile.h"

namespace ek::sm100 {

// A pair of processors multiplies a tile; each has half of its rows, one per lane.
constexpr int kPair = 2;
constexpr int kRows = 128;
using Mma = decltype(cute::make_tiled_mma(
    cute::SM100_MMA_F16BF16_2x1SM_SS<cute::bfloat16_t, cute::bfloat16_t, float, kPair * kRows,
                                     kRowColumns, cute::UMMA::Major::K, cute::UMMA::Major::K>{}));
using Chunk = cute::Shape<cute::Int<kRows>, cute::Int<kChunk>>;
using ReadChunk = cute::SM100_TMEM_LOAD_32dp32b64x;

// One processor's half of a tile, [kRows, kChunk, 1, chunks].
template <class Engine, class Layout>
EK_HD auto chunks_of(cute::Tensor<Engine, Layout> const& half) {
  return cute::flat_divide(half, Chunk{});
}

// How the kRows threads that sum rows read one of them.
template <class Engine, class Layout>
EK_HD auto reads_of(cute::Tensor<Engine, Layout> const& chunks) {
  return cute::make_tmem_copy(ReadChunk{}, chunks(cute::_, cute::_, cute::_0{}, cute::_0{}));
}

}  // namespace ek::sm100
