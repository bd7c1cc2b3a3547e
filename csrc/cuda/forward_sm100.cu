// Forward statistics on Blackwell, compiled once for each EK_STATISTICS: hidden W^T by CUTLASS's
// TMA and tcgen05. A pair of processors multiplies 256 x 256 x 64 into tensor memory while the
// threads of the epilogue sum the tile before.
#include <cutlass/device_kernel.h>

#include <cutlass/cluster_launch.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "collective_sm100.h"
#include "error.h"
#include "forward_kernels.h"

namespace ek::sm100 {

using Element = cutlass::bfloat16_t;
using Block = cute::Shape<cute::Int<kPair * kRows>, cute::Int<kRowColumns>, cute::_64>;
using Cluster = cute::Shape<cute::Int<kPair>, cute::_1, cute::_1>;
using Epilogue = cutlass::epilogue::collective::detail::Sm100TmaWarpSpecializedAdapter<
    RowEpilogue<EK_STATISTICS>>;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm100, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8,
    Element, cutlass::layout::ColumnMajor, 8, float, Block, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<0>,
    cutlass::gemm::KernelTmaWarpSpecialized2SmSm100>::CollectiveOp;
using Kernel =
    TilesOfRows<cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                     Epilogue, RowRangeScheduler>>;
static_assert(std::is_same_v<typename Mainloop::TiledMma, Mma>,
              "the tests prove the layout of Mma");

}  // namespace ek::sm100

namespace ek {

template <bool kStatistics>
void forward_sm100(Head const& head, Forward const& out, int processors, Stream stream) {
  using namespace sm100;
  RowRange const range{nullptr, out.number, head.rows};
  typename Kernel::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = {head.rows, head.vocabulary, head.depth, 1};
  arguments.mainloop.ptr_A = static_cast<Element const*>(head.hidden);
  arguments.mainloop.dA = {head.stride_hidden, cute::_1{}, 0};
  arguments.mainloop.ptr_B = static_cast<Element const*>(head.weight);
  arguments.mainloop.dB = {head.stride_weight, cute::_1{}, 0};
  arguments.epilogue = {head, out};
  arguments.hw_info.sm_count = processors;
  arguments.scheduler.range = range;
  if (!Kernel::can_implement(arguments))
    throw std::runtime_error("forward_sm100: CUTLASS refuses the product");
  auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  auto const* kernel = reinterpret_cast<void const*>(&cutlass::device_kernel<Kernel>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Kernel::SharedStorageSize),
        "forward_sm100");
  int64_t const units = int64_t(cute::ceil_div(head.rows, kPair * kRows)) *
                        cute::ceil_div(head.vocabulary, kRowColumns);
  int64_t const pairs = std::min<int64_t>(std::max(processors / kPair, 1), units);
  void* kernel_params[] = {&params};
  auto const status = cutlass::ClusterLauncher::launch(
      dim3(unsigned(pairs * kPair)), dim3(kPair), Kernel::get_block_shape(),
      Kernel::SharedStorageSize, static_cast<cudaStream_t>(stream), kernel, kernel_params);
  // CUTLASS's status hides CUDA's error, which would then be taken for the next launch's.
  if (status != cutlass::Status::kSuccess) check(cudaGetLastError(), "forward_sm100");
  check(status, "forward_sm100");
}

template void forward_sm100<EK_STATISTICS>(Head const&, Forward const&, int, Stream);

}  // namespace ek
