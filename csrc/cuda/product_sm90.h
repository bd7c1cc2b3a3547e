// hidden W^T on Hopper by CUTLASS's TMA and wgmma, each tile given to an Operation (collective.h).
#pragma once
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "collective.h"
#include "launch_product.h"
#include "scheduler.h"
#include "tiled_mma.h"

namespace ek {

template <int kColumns, class Operation>
struct ProductSm90 {
  using Tile = Sm90Tile<kColumns>;
  using Shape = typename Tile::Shape;
  using Element = cutlass::bfloat16_t;
  using Schedule =
      std::conditional_t<kColumns == 256, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                         cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      RegisterEpilogue<cutlass::epilogue::NoSmemWarpSpecialized, Operation>>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8,
      Element, cutlass::layout::ColumnMajor, 8, float, Shape, Sm90Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<0>, Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, RowRangeScheduler>;
  static_assert(std::is_same_v<typename Mainloop::TiledMma, typename Tile::Mma>,
                "the tests prove the layout of tiled_mma.h");
  static_assert(Kernel::SharedStorageSize <= 232448, "227 KiB are all that a block may have");

  // Columns [start, start + columns) of the product; range says which rows.
  static void launch(char const* what, Head const& head, int start, int columns, RowRange range,
                     Operation const& operation, int processors, Stream stream) {
    constexpr int kRows = cute::size<0>(Shape{}) * cute::size(Sm90Cluster{});
    launch_product<Kernel, kRows>(what, head, start, columns, range, {operation, range}, processors,
                                  stream);
  }
};

}  // namespace ek
