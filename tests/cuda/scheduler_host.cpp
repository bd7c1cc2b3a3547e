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

template <int kColumns>
void check(int rows, int first, int number, int vocabulary, int clusters) {
  using Tile = typename ek::Sm90Tile<kColumns>::Shape;
  using Scheduler = ek::RowRangeSchedulerSm90<Tile, ek::Sm90Cluster>;
  typename Scheduler::Arguments arguments{};
  arguments.range = {&first, &number, rows};
  auto const problem = cute::make_shape(rows, vocabulary, 64, 1);
  auto const params = Scheduler::to_underlying_arguments(
      problem, Tile{}, ek::Sm90Cluster{}, cutlass::KernelHardwareInfo{}, arguments, nullptr, 1u);
  std::vector<Tiles> produced(2 * clusters), cooperative(2 * clusters), pingpong(2 * clusters);
  simt::launch(dim3(2 * clusters), dim3(32), 0, [&] {
    if (threadIdx.x != 0) return;
    int const block = blockIdx.x;
    {
      Scheduler scheduler{params};
      auto work = scheduler.initial_work_tile_info(ek::Sm90Cluster{});
      while (work.is_valid()) {
        note<Scheduler>(produced[block], work);
        scheduler.advance_to_next_work();
        work = scheduler.get_current_work();
      }
    }
    {
      Scheduler scheduler{params};
      auto work = scheduler.initial_work_tile_info(ek::Sm90Cluster{});
      while (work.is_valid()) {
        note<Scheduler>(cooperative[block], work);
        auto [next, _] = scheduler.fetch_next_work(work, 0, 0);
        work = next;
      }
    }
    Tiles of[2];
    for (int group = 0; group < 2; ++group) {
      Scheduler scheduler{params};
      if (group == 1) scheduler.advance_to_next_work();
      auto work = scheduler.initial_work_tile_info(ek::Sm90Cluster{});
      while (work.is_valid()) {
        note<Scheduler>(of[group], work);
        scheduler.advance_to_next_work(2);
        work = scheduler.get_current_work();
      }
    }
    for (size_t i = 0; i < of[0].size() + of[1].size(); ++i) {
      expect(i / 2 < of[i % 2].size(), "warpgroups take turns");
      if (i / 2 < of[i % 2].size()) pingpong[block].push_back(of[i % 2][i / 2]);
    }
  });
  std::map<std::pair<int, int>, int> times;
  for (int block = 0; block < 2 * clusters; ++block) {
    expect(produced[block] == cooperative[block], "cooperative consumers see the producer's tiles");
    expect(produced[block] == pingpong[block], "pingpong consumers see the producer's tiles");
    Tiles const& leader = produced[block / 2 * 2];
    expect(produced[block].size() == leader.size(), "a cluster's blocks end together");
    for (size_t i = 0; i < produced[block].size(); ++i) {
      expect(produced[block][i] == std::pair(leader[i].first + block % 2, leader[i].second),
             "a cluster's blocks share the weight's tile");
      ++times[produced[block][i]];
    }
  }
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

}  // namespace

int main() {
  for (int const number : {0, 1, 128, 129, 300, 2500, 9999})
    for (int const first : {0, 256})
      for (int const clusters : {1, 3, 66}) {
        check<256>(2600, first, number, 1111, clusters);
        check<128>(700, first, number, 1024, clusters);
      }
  return !right;
}
