// What CUTLASS's kernel of sm_100 takes besides its main loop and scheduler.h: an epilogue that
// reads a tile from tensor memory and keeps it (no C, no D).
#pragma once
#include <cutlass/cutlass.h>

#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "row_chunks.h"
#include "scheduler.h"

namespace ek::sm100 {

template <bool kStatistics>
class RowEpilogue {
 public:
  using DispatchPolicy = cutlass::epilogue::Sm100NoSmemWarpSpecialized;
  using EpilogueTile = Chunk;
  using CopyOpT2R = ReadChunk;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementOutput = float;
  using ElementC = float;  // neither read nor written; GemmUniversalAdapter asks for its alignment
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  using GmemTiledCopyC = void;
  using GmemTiledCopyD = void;
  struct ThreadEpilogueOp {
    static constexpr int kCount = 1;
    using ElementOutput = float;
    using ElementAccumulator = float;
    using ElementCompute = float;
  };
  static constexpr int ThreadCount = kRows;
  static constexpr int kOutputAlignment = 1;
  static constexpr uint32_t TmaTransactionBytes = 0;
  struct SharedStorage {};
  struct Arguments {
    Head head;
    Forward out;
  };
  using Params = Arguments;

  template <class Problem>
  static Params to_underlying_arguments(Problem const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(Problem const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Problem>
  static bool can_implement(Problem const&, Arguments const&) {
    return true;
  }

  CUTLASS_DEVICE RowEpilogue(Params const& params, SharedStorage&) : params_(params) {}

  template <bool kReuse = false, class Pipeline, class State, class Problem, class Tile,
            class Place, class Engine, class Layout>
  CUTLASS_DEVICE auto operator()(Pipeline pipeline, State state, Problem, Tile, Place place,
                                 cute::Tensor<Engine, Layout> const& accumulators, SharedStorage&) {
    using namespace cute;
    int const first = int(get<0>(place)) * kRows;
    if (first < RowRange{nullptr, params_.out.number, params_.head.rows}.end()) {
      auto chunks = chunks_of(accumulators(make_coord(_, _), _0{}, _0{}));
      auto reads = reads_of(chunks);
      int const thread = int(threadIdx.x) % kRows;
      auto sources = reads.get_slice(thread).partition_S(chunks);
      auto load = [&](float (&z)[kChunk], int chunk) {
        // The read is one of the whole warp, whose lanes may have parted.
        __syncwarp();
        auto registers = make_tensor(make_rmem_ptr(&z[0]), Shape<Int<kChunk>, _1, _1>{});
        copy(reads, sources(_, _, _, _0{}, chunk), registers);
        cutlass::arch::fence_view_async_tmem_load();
      };
      int const start = int(get<1>(place)) * kRowColumns;
      row_of_tile<kStatistics>(params_.head, params_.out, first + thread, start, load);
    }
    pipeline.consumer_release(state);
    ++state;
    return make_tuple(state);
  }

 protected:
  Params const& params_;
};

// CUTLASS's kernel multiplies the first tile of a cluster without asking whether there is one.
template <class Kernel>
struct TilesOfRows : Kernel {
  CUTLASS_DEVICE void operator()(typename Kernel::Params const& params, char* shared) {
    if (Kernel::TileScheduler(nullptr, params.scheduler, dim3()).work().is_valid())
      Kernel::operator()(params, shared);
  }
};

}  // namespace ek::sm100
