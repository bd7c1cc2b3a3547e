// hidden W^T on Ampere and Ada by CUTLASS's cp.async main loop, each tile given to an Operation
// (collective.h).
#pragma once
#include <cutlass/gemm/collective/collective_mma_decl.hpp>
// After it.
#include <cutlass/gemm/collective/sm80_mma_multistage.hpp>

#include "error.h"
#include "launch.h"
#include "tile_order.h"
#include "tiled_mma.h"

namespace ek {

struct MainloopSm80 {
  static constexpr int kStages = 3;
  using Element = cutlass::bfloat16_t;
  using Stride = cute::Stride<int64_t, cute::_1>;
  using Shared = decltype(cute::composition(
      cute::Swizzle<3, 3, 3>{},
      cute::Layout<cute::Shape<cute::_8, cute::_64>, cute::Stride<cute::_64, cute::_1>>{}));
  using FromGlobal = decltype(cute::make_tiled_copy(
      cute::Copy_Atom<cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>, Element>{},
      cute::Layout<cute::Shape<cute::_32, cute::_8>, cute::Stride<cute::_8, cute::_1>>{},
      cute::Layout<cute::Shape<cute::_1, cute::_8>>{}));
  using FromShared = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;
  using Type = cutlass::gemm::collective::CollectiveMma<
      cutlass::gemm::MainloopSm80CpAsync<kStages>, Sm80Tile::Shape, Element, Stride, Element,
      Stride, Sm80Tile::Mma, FromGlobal, Shared, FromShared, cute::identity, FromGlobal, Shared,
      FromShared, cute::identity>;
};

// One block per tile; it ends before its product where the tile has no rows.
template <class Operation>
__global__ void __launch_bounds__(cute::size(Sm80Tile::Mma{}))
    product_sm80_kernel(Head const head, int const start, int const columns, RowRange const range,
                        Operation const operation) {
  using namespace cute;
  using Element = MainloopSm80::Element;
  EK_DYNAMIC(shared, char);
  Sm80Tile::Shape const tile;
  TileOrder const order(range, size<0>(tile), 1, ceil_div(columns, size<1>(tile)));
  if (!order.has(blockIdx.x)) return;
  int block, split;
  order.find(blockIdx.x, 0, block, split);
  int const end = range.end();

  auto const* weight = static_cast<Element const*>(head.weight) + start * head.stride_weight;
  Tensor a = make_tensor(make_gmem_ptr(static_cast<Element const*>(head.hidden)),
                         make_shape(end, head.depth), make_stride(head.stride_hidden, _1{}));
  Tensor b = make_tensor(make_gmem_ptr(weight), make_shape(columns, head.depth),
                         make_stride(head.stride_weight, _1{}));
  Tensor tiles_a = local_tile(a, select<0, 2>(tile), make_coord(block, _));
  Tensor tiles_b = local_tile(b, select<1, 2>(tile), make_coord(split, _));
  auto const residue = make_tuple(end - block * size<0>(tile), columns - split * size<1>(tile),
                                  head.depth - size<1>(tiles_a) * size<2>(tiles_a));
  Sm80Tile::Mma mma;
  Tensor accumulators = partition_fragment_C(mma, select<0, 1>(tile));
  clear(accumulators);
  MainloopSm80::Type{}(accumulators, tiles_a, tiles_b, accumulators,
                       make_coord_iterator(shape<2>(tiles_a)), size<2>(tiles_a), residue,
                       int(threadIdx.x), shared);
  operation(tile, block, split, end, accumulators, mma, int(threadIdx.x), shared);
}

// Columns [start, start + columns) of the product; range says which rows.
template <class Operation>
void product_sm80(char const* what, Head const& head, int start, int columns, RowRange range,
                  Operation const& operation, Stream stream) {
  using Tile = Sm80Tile::Shape;
  constexpr int kShared = sizeof(typename MainloopSm80::Type::SharedStorage);
  static_assert(kShared <= 101376, "99 KiB are all that Ada has");
  static_assert(Operation::template shared_bytes<Tile, Sm80Tile::Mma>() <= kShared);
  auto const* kernel = reinterpret_cast<void const*>(&product_sm80_kernel<Operation>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), what);
  int const blocks = cute::ceil_div(head.rows, cute::size<0>(Tile{})) *
                     cute::ceil_div(columns, cute::size<1>(Tile{}));
  EK_LAUNCH_DYNAMIC(product_sm80_kernel<Operation>, dim3(blocks), dim3(cute::size(Sm80Tile::Mma{})),
                    kShared, stream, head, start, columns, range, operation);
}

}  // namespace ek
