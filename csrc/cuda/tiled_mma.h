// The tiles that are compiled, and which thread multiplies what of them: CuTe alone, so that a host
// compiler takes these types too.
#pragma once
#include <cute/arch/mma_sm90.hpp>
#include <cute/atom/mma_atom.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace ek {

// Hopper: two warpgroups, each with 64 rows of a tile of 256 columns, or each with a tile of its
// own (pingpong) of 128.
template <int kColumns>
struct Sm90Tile;

template <>
struct Sm90Tile<256> {
  using Shape = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90_64x256x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>{},
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
};

template <>
struct Sm90Tile<128> {
  using Shape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90_64x128x16_F32BF16BF16_SS<cute::GMMA::Major::K, cute::GMMA::Major::K>{},
      cute::Layout<cute::Shape<cute::_1, cute::_1, cute::_1>>{}));
};

// Blocks of rows in a cluster: they share the weight's tile.
using Sm90Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

// Ampere and Ada: four by two warps of 32 x 64 each. A warp has 32 neighbouring columns of each 64,
// which it stores as whole sectors.
struct Sm80Tile {
  using Shape = cute::Shape<cute::_128, cute::_128, cute::_64>;
  using Mma = cute::TiledMMA<cute::MMA_Atom<cute::SM80_16x8x16_F32BF16BF16F32_TN>,
                             cute::Layout<cute::Shape<cute::_4, cute::_2, cute::_1>>,
                             cute::Tile<cute::_64,
                                        cute::Layout<cute::Shape<cute::_8, cute::_2, cute::_4>,
                                                     cute::Stride<cute::_1, cute::_32, cute::_8>>,
                                        cute::_16>>;
};

}  // namespace ek
