// Forward statistics on Blackwell, compiled once for each EK_STATISTICS: hidden W^T by CUTLASS's
// TMA and tcgen05. A pair of processors multiplies 256 x 256 x 64 into tensor memory while the
// threads of the epilogue sum the tile before.
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "collective_sm100.h"
#include "forward_kernels.h"
#include "launch_product.h"

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
  launch_product<sm100::Kernel, sm100::kPair * sm100::kRows>(
      "forward_sm100", head, 0, head.vocabulary, {nullptr, out.number, head.rows}, {head, out},
      processors, stream);
}

template void forward_sm100<EK_STATISTICS>(Head const&, Forward const&, int, Stream);

}  // namespace ek
