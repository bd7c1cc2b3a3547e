// The scheduler as CUTLASS's kernels call it: the producer and the warpgroups of consumers of each
// block see the same tiles, blocks of a cluster move together, and each tile is taken once.
// CUTLASS's headers come first, and want what CUDA declares without nvcc's help.
#include <device_launch_parameters.h>
int atomicCAS(int*, int, int);
void __syncthreads();
void __syncwarp(unsigned = 0);
#include <cstdio>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>
#include <map>
#include <utility>
#include <vector>

#include "kernel.h"
#include "scheduler.h"
#include "tiled_mma.h"

namespace {

using Tiles = std::vector<std::pair<int, int>>;
bool right = true;

void expect(bool holds, char const* what) {
  if (!holds) std::printf("%s\n", what);
  right &= holds;
}

template <class Scheduler, class Work>
void note(Tiles& tiles, Work const& work) {
  expect(Scheduler::compute_epilogue(work, typename Scheduler::Params{}), "has an epilogue");
  expect(work.L_idx == 0, "one batch");
  tiles.emplace_back(work.M_idx, work.N_idx);
}

// What the roles of a block see, each with a scheduler of its own.
struct Seen {
  Tiles produced, cooperative, group[2];

  // The warpgroups of pingpong take turns.
  Tiles pingpong() const {
    Tiles both;
    for (size_t i = 0; i < group[0].size() + group[1].size(); ++i) {
      expect(i / 2 < group[i % 2].size(), "warpgroups take turns");
      if (i / 2 < group[i % 2].size()) both.push_back(group[i % 2][i / 2]);
    }
    return both;
  }
};

template <class Scheduler, class Params>
void walk(Params const& params, Seen& seen) {
  // `step` tiles at a time, as the producer and pingpong's consumers go; 0: as cooperative ones.
  auto const tiles = [&](int skip, int step) {
    Tiles found;
    Scheduler scheduler{params};
    if (skip) scheduler.advance_to_next_work(skip);
    auto work = scheduler.initial_work_tile_info(ek::Sm90Cluster{});
    while (work.is_valid()) {
      note<Scheduler>(found, work);
      if (step == 0) {
        auto [next, _] = scheduler.fetch_next_work(work, 0, 0);
        work = next;
      } else {
        scheduler.advance_to_next_work(step);
        work = scheduler.get_current_work();
      }
    }
    return found;
  };
  seen = {tiles(0, 1), tiles(0, 0), {tiles(0, 2), tiles(1, 2)}};
}

// How often each tile is taken, by blocks of which two make a cluster.
std::map<std::pair<int, int>, int> times_of(std::vector<Seen> const& seen) {
  std::map<std::pair<int, int>, int> times;
  for (size_t block = 0; block < seen.size(); ++block) {
    Tiles const& mine = seen[block].produced;
    Tiles const& leader = seen[block / 2 * 2].produced;
    expect(mine == seen[block].cooperative, "cooperative consumers see the producer's tiles");
    expect(mine == seen[block].pingpong(), "pingpong consumers see the producer's tiles");
    expect(mine.size() == leader.size(), "a cluster's blocks end together");
    for (size_t i = 0; i < mine.size(); ++i) {
      expect(mine[i] == std::pair(leader[i].first + int(block % 2), leader[i].second),
             "a cluster's blocks share the weight's tile");
      ++times[mine[i]];
    }
  }
  return times;
}

template <int kColumns>
void check(int rows, int first, int number, int vocabulary, int clusters) {
  using Tile = typename ek::Sm90Tile<kColumns>::Shape;
  using Scheduler = ek::RowRangeSchedulerSm90<Tile, ek::Sm90Cluster>;
  typename Scheduler::Arguments arguments{};
  arguments.range = {&first, &number, rows};
  auto const params = Scheduler::to_underlying_arguments(
      cute::make_shape(rows, vocabulary, 64, 1), Tile{}, ek::Sm90Cluster{},
      cutlass::KernelHardwareInfo{}, arguments, nullptr, 1u);
  std::vector<Seen> seen(2 * clusters);
  simt::launch(dim3(2 * clusters), dim3(32), 0, [&] {
    if (threadIdx.x == 0) walk<Scheduler>(params, seen[blockIdx.x]);
  });
  auto times = times_of(seen);
  int const end = number < rows ? number : rows;
  int wanted = 0;
  for (int row = first; row < end; row += 128)
    for (int column = 0; column < vocabulary; column += kColumns, ++wanted)
      expect(times[std::pair(row / 128, column / kColumns)] == 1, "each tile with rows once");
  for (auto const& [tile, count] : times) {
    expect(count == 1 && tile.second * kColumns < vocabulary, "no tile twice, none past the end");
    wanted -= tile.first * 128 < end;
  }
  expect(wanted == 0, "no tile before the first");
}

// On sm_100 every warp asks for itself, and a block's rank is added to the row.
void check_sm100(int rows, int number, int vocabulary, int clusters) {
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Scheduler = ek::RowRangeSchedulerSm100<Tile, ek::Sm90Cluster>;
  typename Scheduler::Arguments arguments{};
  arguments.range = {nullptr, &number, rows};
  auto const problem = cute::make_shape(rows, vocabulary, 64, 1);
  auto const params = Scheduler::to_underlying_arguments(problem, Tile{}, ek::Sm90Cluster{},
                                                         ek::Sm90Cluster{}, {}, arguments, nullptr);
  std::vector<Tiles> seen(2 * clusters);
  simt::launch(dim3(2 * clusters), dim3(32), 0, [&] {
    if (threadIdx.x != 0) return;
    Scheduler scheduler(nullptr, params, dim3(blockIdx.x % 2));
    auto work = scheduler.initial_work_tile_info(ek::Sm90Cluster{});
    expect(work.is_valid() == scheduler.work().is_valid(), "a kernel that ends has no tile");
    while (work.is_valid()) {
      note<Scheduler>(seen[blockIdx.x], work);
      auto [next, _] = scheduler.fetch_next_work(work, 0, 0);
      work = next;
    }
  });
  std::map<std::pair<int, int>, int> times;
  for (int block = 0; block < 2 * clusters; ++block) {
    expect(seen[block] == seen[block / 2 * 2], "a pair has the same tiles");
    for (auto const& [row, column] : seen[block]) ++times[{row + block % 2, column}];
  }
  int const end = number < rows ? number : rows;
  int const pairs = (end + 255) / 256, columns = (vocabulary + 255) / 256;
  expect(int(times.size()) == 2 * pairs * columns, "the tiles of all pairs that have rows");
  for (auto const& [tile, count] : times)
    expect(count == 1 && tile.first < 2 * pairs && tile.second < columns, "each tile once");
}

}  // namespace

int main() {
  for (int const number : {0, 1, 128, 129, 300, 2500, 9999})
    for (int const clusters : {1, 3, 66}) check_sm100(2600, number, 1111, clusters);
  for (int const number : {0, 1, 128, 129, 300, 2500, 9999})
    for (int const first : {0, 256})
      for (int const clusters : {1, 3, 66}) {
        check<256>(2600, first, number, 1111, clusters);
        check<128>(700, first, number, 1024, clusters);
      }
  return !right;
}
