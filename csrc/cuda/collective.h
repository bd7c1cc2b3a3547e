// CUTLASS's collective around an operation on a tile's accumulators, which never leave the
// registers: no C, no D.
//
// An Operation is a struct of plain values that kernels get by value. Its
//   operator()(tile, block, split, end, accumulators, tiled_mma, thread, shared)
// takes what one thread holds of the tile [block, split] of hidden W^T: `tile` is the static shape
// (rows, columns, depth), rows from `end` on are not there, and `shared` has the
// shared_bytes<Tile, TiledMma>() of memory that it asks for.
#pragma once
#include <cutlass/cutlass.h>

#include <cutlass/epilogue/collective/detail.hpp>

#include "tile_order.h"

namespace ek {

template <class Schedule, class Operation>
class RegisterEpilogue {
 public:
  struct Arguments {
    Operation operation;
    RowRange range;
  };
  using Params = Arguments;
  using DispatchPolicy = Schedule;
  using EpilogueSchedule = Schedule;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementOutput = float;
  using ElementC = float;  // as ElementD never read or written, but CUTLASS asks for their types
  using ElementD = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  struct ThreadEpilogueOp {
    static constexpr int kCount = 1;
    using ElementOutput = float;
    using ElementAccumulator = float;
    using ElementCompute = float;
  };
  struct SharedStorage {};

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& arguments,
                                                  void*) {
    return arguments;
  }
  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <class Problem>
  static bool can_implement(Problem const&, Arguments const&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit RegisterEpilogue(Params const& params,
                                                SharedStorage const& = SharedStorage())
      : params_(params) {}

  template <class Problem, class Tile, class Block, class Engine, class Layout0, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem, Tile tile, Block block,
                                 cute::Tensor<Engine, Layout0>& accumulators, TiledMma mma, Residue,
                                 int thread, char*) {
    static_assert(Operation::template shared_bytes<Tile, TiledMma>() == 0,
                  "two warpgroups with a tile each have no memory to share");
    params_.operation(tile, int(cute::get<0>(block)), int(cute::get<1>(block)), params_.range.end(),
                      accumulators, mma, thread, nullptr);
  }

 private:
  Params const& params_;
};

}  // namespace ek
