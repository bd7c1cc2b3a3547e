// hidden W^T on Hopper by CUTLASS's TMA and wgmma, each tile given to an Operation (collective.h).
#pragma once
#include <cutlass/device_kernel.h>

#include <algorithm>
#include <cstring>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "collective.h"
#include "error.h"
#include "launch.h"
#include "scheduler.h"
#include "tiled_mma.h"

namespace ek {

// Where the driver refuses a descriptor, CUTLASS prints that, and goes on with zeros.
inline void check_descriptor(char const* what, char const* name, cute::TmaDescriptor const* tma) {
  static cute::TmaDescriptor const zeros{};
  if (std::memcmp(tma, &zeros, sizeof zeros) == 0)
    throw std::runtime_error(std::string(what) + ": cuTensorMapEncodeTiled refuses " + name);
}

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
    typename Kernel::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = {head.rows, columns, head.depth, 1};
    arguments.mainloop.ptr_A = static_cast<Element const*>(head.hidden);
    arguments.mainloop.dA = {head.stride_hidden, cute::_1{}, 0};
    arguments.mainloop.ptr_B =
        static_cast<Element const*>(head.weight) + start * head.stride_weight;
    arguments.mainloop.dB = {head.stride_weight, cute::_1{}, 0};
    arguments.epilogue = {operation, range};
    arguments.hw_info.sm_count = processors;
    arguments.scheduler.range = range;
    if (!Kernel::can_implement(arguments))
      throw std::runtime_error(std::string(what) + ": CUTLASS refuses the product");
    auto params = Kernel::to_underlying_arguments(arguments, nullptr);
    check_descriptor(what, "hidden", params.mainloop.tma_load_a.get_tma_descriptor());
    check_descriptor(what, "weight", params.mainloop.tma_load_b.get_tma_descriptor());
    auto const* kernel = reinterpret_cast<void const*>(&cutlass::device_kernel<Kernel>);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Kernel::SharedStorageSize),
          what);
    constexpr int kCluster = cute::size(Sm90Cluster{});
    int64_t const units = int64_t(cute::ceil_div(head.rows, cute::size<0>(Shape{}) * kCluster)) *
                          cute::ceil_div(columns, cute::size<1>(Shape{}));
    int64_t const clusters = std::min<int64_t>(std::max(processors / kCluster, 1), units);
    void* kernel_params[] = {&params};
    auto const status = cutlass::ClusterLauncher::launch(
        dim3(unsigned(clusters * kCluster)), dim3(kCluster), Kernel::get_block_shape(),
        Kernel::SharedStorageSize, static_cast<cudaStream_t>(stream), kernel, kernel_params);
    // CUTLASS's status hides CUDA's error, which would then be taken for the next launch's.
    if (status != cutlass::Status::kSuccess) check(cudaGetLastError(), what);
    check(status, what);
  }
};

}  // namespace ek
