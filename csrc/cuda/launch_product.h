// The launch of a product by one of CUTLASS's persistent kernels in clusters, of sm_90 or sm_100.
#pragma once
#include <cutlass/device_kernel.h>

#include <algorithm>
#include <cstring>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "error.h"
#include "launch.h"
#include "tile_order.h"

namespace ek {

// Where the driver refuses a descriptor, CUTLASS prints that, and goes on with zeros.
inline void check_descriptor(char const* what, char const* name, cute::TmaDescriptor const* tma) {
  static cute::TmaDescriptor const zeros{};
  if (std::memcmp(tma, &zeros, sizeof zeros) == 0)
    throw std::runtime_error(std::string(what) + ": cuTensorMapEncodeTiled refuses " + name);
}

// Columns [start, start + columns) of the product; range says which rows. kClusterRows: those that
// the blocks of a cluster multiply at a time.
template <class Kernel, int kClusterRows>
void launch_product(char const* what, Head const& head, int start, int columns, RowRange range,
                    typename Kernel::EpilogueArguments const& epilogue, int processors,
                    Stream stream) {
  using Element = cutlass::bfloat16_t;
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {head.rows, columns, head.depth, 1};
  arguments.mainloop.ptr_A = static_cast<Element const*>(head.hidden);
  arguments.mainloop.dA = {head.stride_hidden, cute::_1{}, 0};
  arguments.mainloop.ptr_B = static_cast<Element const*>(head.weight) + start * head.stride_weight;
  arguments.mainloop.dB = {head.stride_weight, cute::_1{}, 0};
  arguments.epilogue = epilogue;
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
  constexpr int kCluster = cute::size(typename Kernel::ClusterShape{});
  constexpr int kColumns = cute::size<1>(typename Kernel::TileShape{});
  int64_t const units =
      int64_t(cute::ceil_div(head.rows, kClusterRows)) * cute::ceil_div(columns, kColumns);
  int64_t const clusters = std::min<int64_t>(std::max(processors / kCluster, 1), units);
  void* kernel_params[] = {&params};
  auto const status = cutlass::ClusterLauncher::launch(
      dim3(unsigned(clusters * kCluster)), dim3(kCluster), Kernel::get_block_shape(),
      Kernel::SharedStorageSize, static_cast<cudaStream_t>(stream), kernel, kernel_params);
  // CUTLASS's status hides CUDA's error, which would then be taken for the next launch's.
  if (status != cutlass::Status::kSuccess) check(cudaGetLastError(), what);
  check(status, what);
}

}  // namespace ek
