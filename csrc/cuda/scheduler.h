// CUTLASS's persistent scheduler with TileOrder in place of its own order: producer and consumers
// read the number of rows from the device, and end together.
#pragma once
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include "tile_order.h"

namespace ek {

struct RowRangeScheduler {};  // the tag by which a kernel asks for it

template <class TileShape, class ClusterShape>
class RowRangeSchedulerSm90 : public cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90 {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;

 public:
  static_assert(cute::size<1>(ClusterShape{}) == 1 && cute::size<2>(ClusterShape{}) == 1);
  static constexpr int kRows = cute::size<0>(TileShape{});
  static constexpr int kCluster = cute::size<0>(ClusterShape{});
  using WorkTileInfo = typename Base::WorkTileInfo;

  struct Arguments : Base::Arguments {
    RowRange range;
  };
  struct Params : Base::Params {
    RowRange range;
    int splits;
  };

  template <class Problem, class... Rest>
  static Params to_underlying_arguments(Problem problem, TileShape tile, ClusterShape,
                                        cutlass::KernelHardwareInfo const&,
                                        Arguments const& arguments, Rest...) {
    Params params{};
    params.range = arguments.range;
    params.splits = cute::ceil_div(cute::get<1>(problem), cute::size<1>(tile));
    return params;
  }

  CUTLASS_DEVICE explicit RowRangeSchedulerSm90(Params const& params)
      : order_(params.range, kRows, kCluster, params.splits), unit_(blockIdx.x / kCluster),
        step_(gridDim.x / kCluster) {}

  CUTLASS_DEVICE WorkTileInfo get_current_work() const {
    if (!order_.has(unit_)) return WorkTileInfo::invalid_work_tile();
    int block, split;
    order_.find(unit_, int(blockIdx.x % kCluster), block, split);
    return {block, split, 0, true};
  }

  template <class Cluster>
  CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Cluster) const {
    return get_current_work();
  }

  CUTLASS_DEVICE void advance_to_next_work(uint32_t count = 1) { unit_ += int64_t(step_) * count; }

  template <class... Pipeline>
  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo, Pipeline&&...) {
    advance_to_next_work();
    return cute::make_tuple(get_current_work(), true);
  }

 private:
  TileOrder order_;
  int64_t unit_;
  int step_;
};

// The same for sm_100, whose kernels add a block's rank in its cluster. TileShape is a block's.
template <class TileShape, class ClusterShape>
class RowRangeSchedulerSm100
    : public cutlass::gemm::kernel::detail::StaticPersistentTileScheduler100 {
  using Base = cutlass::gemm::kernel::detail::StaticPersistentTileScheduler100;

 public:
  static_assert(cute::size<1>(ClusterShape{}) == 1 && cute::size<2>(ClusterShape{}) == 1);
  static constexpr int kRows = cute::size<0>(TileShape{});
  static constexpr int kCluster = cute::size<0>(ClusterShape{});
  using WorkTileInfo = typename Base::WorkTileInfo;

  struct Arguments : Base::Arguments {
    RowRange range;
  };
  struct Params : Base::Params {
    RowRange range;
    int splits;
  };

  template <class Problem, class Tile, class Pair>
  static Params to_underlying_arguments(Problem problem, Tile, Pair, ClusterShape,
                                        cutlass::KernelHardwareInfo const&,
                                        Arguments const& arguments, void*) {
    Params params{};
    params.range = arguments.range;
    params.splits = cute::ceil_div(cute::get<1>(problem), cute::size<1>(TileShape{}));
    return params;
  }

  CUTLASS_DEVICE RowRangeSchedulerSm100(CLCResponse* response, Params const& params, dim3 rank)
      : Base(response, params, rank), order_(params.range, kRows, kCluster, params.splits),
        unit_(blockIdx.x / kCluster), step_(gridDim.x / kCluster) {}

  CUTLASS_DEVICE WorkTileInfo work() const {
    if (!order_.has(unit_)) return WorkTileInfo::invalid_work_tile();
    int block, split;
    order_.find(unit_, 0, block, split);
    return {block, split, 0, true};
  }

  template <class Cluster>
  CUTLASS_DEVICE WorkTileInfo initial_work_tile_info(Cluster) const {
    return work();
  }

  template <class... Pipeline>
  CUTLASS_DEVICE auto fetch_next_work(WorkTileInfo, Pipeline&&...) {
    unit_ += step_;
    return cute::make_tuple(work(), true);
  }

 private:
  TileOrder order_;
  int64_t unit_;
  int step_;
};

}  // namespace ek

namespace cutlass::gemm::kernel::detail {

template <class TileShape, class ClusterShape, uint32_t kStages>
struct TileSchedulerSelector<ek::RowRangeScheduler, cutlass::arch::Sm90, TileShape, ClusterShape,
                             kStages> {
  using Scheduler = ek::RowRangeSchedulerSm90<TileShape, ClusterShape>;
};

template <class TileShape, class ClusterShape, uint32_t kStages>
struct TileSchedulerSelector<ek::RowRangeScheduler, cutlass::arch::Sm100, TileShape, ClusterShape,
                             kStages> {
  using Scheduler = ek::RowRangeSchedulerSm100<TileShape, ClusterShape>;
};

}  // namespace cutlass::gemm::kernel::detail
