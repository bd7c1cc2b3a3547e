// Small kernels, right ones and broken ones, that show what fibers and sanitizers see of CUDA. The
// arguments are a kernel's name and the seeds of its schedules; an odd one also changes threads at
// atomics and shuffles.
#include <cstdio>

#include "kernel.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64, kBlocks = 3;
using Longs = unsigned long long;

int wrong = 0;  // results that a kernel or its caller found wrong

void expect(bool right) { wrong += !right; }
void expect_in_kernel(bool right, int* count) {
  if (!right) atomicAdd(count, 1);
}

template <class Kernel, class... Arguments>
void run(Kernel kernel, int blocks, int threads, Arguments... arguments) {
  EK_LAUNCH_DYNAMIC(kernel, dim3(blocks), dim3(threads), 128 * sizeof(int), nullptr, arguments...);
}

// Right ones.

__global__ void shuffles(int* bad) {
  int const lane = threadIdx.x % 32;
  for (int width = 1; width <= 32; width *= 2) {
    int const first = lane / width * width;
    for (int by = 0; by < 32; ++by) {
      double const mine = 1000.0 * width + lane, none = 1000.0 * width;
      expect_in_kernel(__shfl_sync(kAll, mine, by, width) == none + first + by % width, bad);
      int const down = lane + by < first + width ? lane + by : lane;
      expect_in_kernel(__shfl_down_sync(kAll, mine, by, width) == none + down, bad);
      int const up = lane - by >= first ? lane - by : lane;
      expect_in_kernel(__shfl_up_sync(kAll, mine, by, width) == none + up, bad);
      int const with = (lane ^ by) < first + width ? lane ^ by : lane;
      expect_in_kernel(__shfl_xor_sync(kAll, mine, by, width) == none + with, bad);
    }
  }
}

__global__ void masks(int* bad) {
  int const lane = threadIdx.x % 32;
  unsigned const odd = 0xaaaaaaaau, mine = lane % 2 ? odd : ~odd;
  if (lane % 2) {
    expect_in_kernel(__shfl_xor_sync(odd, lane, 2) == (lane ^ 2), bad);
    expect_in_kernel(__ballot_sync(odd, lane > 15) == (odd & 0xffff0000u), bad);
    __syncwarp(odd);
  }
  expect_in_kernel(__shfl_down_sync(mine, lane, 30) == (lane < 2 ? lane + 30 : lane), bad);
  expect_in_kernel(__ballot_sync(kAll, lane % 4 == 1) == 0x22222222u, bad);
  expect_in_kernel(__any_sync(mine, lane == 2) == (lane % 2 == 0), bad);
  expect_in_kernel(__all_sync(mine, lane % 2), bad + (lane % 2 == 0));
  expect_in_kernel(__match_any_sync(kAll, lane / 8 * 1e9) == 0xffu << lane / 8 * 8, bad);
  expect_in_kernel(__popc(mine) == 16 && __ffs(8) == 4 && __clz(1) == 31, bad);
}

__global__ void atomics(int* bad, int* ints, unsigned* words, Longs* longs, float* floats,
                        double* doubles) {
  EK_SHARED(here, int);
  if (threadIdx.x == 0) here = 0;
  __syncthreads();
  atomicAdd(&here, 2);
  atomicAdd(ints, -1);
  atomicAdd(words, 1u);
  atomicAdd(longs, Longs{1} << 33);
  atomicAdd(floats, 0.5f);
  atomicAdd(doubles, 0.25);
  atomicMax(ints + 1, int(blockIdx.x * blockDim.x + threadIdx.x));
  __syncthreads();
  expect_in_kernel(here == 2 * kThreads, bad);
}

__global__ void neighbours(int* out) {
  EK_SHARED(here, int[kThreads]);
  EK_DYNAMIC(there, int);
  int const t = threadIdx.x;
  for (int i = 0; i < 3; ++i) {
    here[t] = 10 * i + t;
    there[kThreads + t] = here[t] + 1;
    __syncthreads();
    out[blockIdx.x * kThreads + t] = here[kThreads - 1 - t] + there[kThreads + (t + 1) % kThreads];
    __syncthreads();
  }
}

__global__ void lanes_through_memory(int* out) {
  EK_SHARED(here, int[kThreads]);
  here[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = here[threadIdx.x ^ 31];
}

template <bool kFirst, bool kSecond>
__global__ void last_block(int* parts, unsigned* arrived, int* sum) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = blockIdx.x + 1;
  if (kFirst) __threadfence();
  if (atomicAdd(arrived, 1u) + 1 < gridDim.x) return;
  if (kSecond) __threadfence();
  for (unsigned b = 0; b < gridDim.x; ++b) *sum += parts[b];
}

__global__ void indices(int* seen) {
  unsigned const block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  unsigned const thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  atomicAdd(&seen[block * 32 + thread], 1);
}

// Broken ones.

__global__ void no_barrier(int* out) {
  EK_SHARED(here, int[kThreads]);
  here[threadIdx.x] = threadIdx.x;
  out[blockIdx.x * kThreads + threadIdx.x] = here[threadIdx.x ^ 32];
}
__global__ void no_second_barrier(int* out) {
  EK_SHARED(here, int);
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) here = i;
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = here;
  }
}
__global__ void shuffle_for_a_barrier(int* out) {
  EK_SHARED(here, int[kThreads]);
  here[threadIdx.x] = threadIdx.x;
  __shfl_xor_sync(kAll, 0, 1);
  out[blockIdx.x * kThreads + threadIdx.x] = here[threadIdx.x ^ 1];
}
__global__ void race_of_blocks(int* out) {
  __syncthreads();
  if (threadIdx.x == 32 * blockIdx.x) *out = 1;
  __syncthreads();
}
__global__ void not_atomic(int* out) { ++*out; }
__global__ void divergent() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void two_instructions(int* out) {
  if (threadIdx.x % 2)
    *out = __shfl_sync(kAll, 1, 0);
  else
    *out = __ballot_sync(kAll, 1);
}
__global__ void ended_lanes(int* out) {
  if (threadIdx.x % 2) return;
  atomicAdd(out, __shfl_xor_sync(kAll, 1, 1));
}
__global__ void not_in_its_mask(int* out) { atomicAdd(out, __shfl_sync(0xffffu, 1, 0)); }
__global__ void lane_outside_the_mask(int* out) {
  if (threadIdx.x % 32 < 16) atomicAdd(out, __shfl_down_sync(0xffffu, 1, 15));
}
__global__ void odd_width(int* out) { atomicAdd(out, __shfl_sync(kAll, 1, 0, 12)); }
__global__ void unwritten(int* out) {
  EK_SHARED(here, int);
  atomicAdd(&here, 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(out, here);
}
__global__ void unwritten_dynamic(int* out) {
  EK_DYNAMIC(there, float);
  if (there[threadIdx.x] == 0.0f || there[threadIdx.x] < 1e30f) atomicAdd(out, 1);
}
__global__ void past_static(int* out, int beyond) {
  EK_SHARED(here, int[kThreads]);
  int* const from = here;
  from[threadIdx.x + beyond] = 1;
  out[threadIdx.x] = 1;
}
__global__ void past_dynamic(int* out) {
  EK_DYNAMIC(there, int);
  there[threadIdx.x + 65] = 1;
  out[threadIdx.x] = 1;
}
__global__ void in_order(int* next, int* bad) {
  expect_in_kernel(atomicAdd(next, 1) == int(blockIdx.x * kThreads + threadIdx.x), bad);
}
__global__ void nothing_in_between(int* next, int* bad) {
  int const ticket = atomicAdd(next, 1);
  expect_in_kernel(atomicAdd(next, 1) == ticket + 1, bad);
}

void right(std::string const& name) {
  std::vector<int> out(kBlocks * kThreads, -1);
  if (name == "shuffles") run(shuffles, kBlocks, kThreads, &wrong);
  if (name == "masks") {
    int bad[2] = {};  // the second: where all_sync is right to say no
    run(masks, kBlocks, kThreads, bad);
    expect(bad[0] == 0 && bad[1] == kBlocks * kThreads / 2);
  }
  if (name == "atomics") {
    int ints[2] = {}, threads = kBlocks * kThreads;
    unsigned words = 0;
    Longs longs = 0;
    float floats = 0;
    double doubles = 0;
    run(atomics, kBlocks, kThreads, &wrong, ints, &words, &longs, &floats, &doubles);
    expect(ints[0] == -threads && ints[1] == threads - 1 && words == unsigned(threads));
    expect(longs == Longs(threads) << 33 && floats == 0.5f * threads && doubles == 0.25 * threads);
  }
  if (name == "neighbours") {
    run(neighbours, kBlocks, kThreads, out.data());
    for (int i = 0; i < kBlocks * kThreads; ++i) {
      int const t = i % kThreads;
      expect(out[i] == 20 + kThreads - 1 - t + 21 + (t + 1) % kThreads);
    }
  }
  if (name == "lanes through memory") {
    run(lanes_through_memory, kBlocks, kThreads, out.data());
    for (int i = 0; i < kBlocks * kThreads; ++i) expect(out[i] == (i % kThreads ^ 31));
  }
  if (name == "last block") {
    unsigned arrived = 0;
    int sum = 0;
    run(last_block<true, true>, kBlocks, kThreads, out.data(), &arrived, &sum);
    expect(sum == 6);
  }
  if (name == "indices") {
    std::vector<int> seen(2 * 2 * 3 * 32);
    EK_LAUNCH(indices, dim3(2, 2, 3), dim3(4, 2, 4), nullptr, seen.data());
    for (int times : seen) expect(times == 1);
  }
  if (name == "two launches") {
    for (int i = 0; i < 2; ++i) run(lanes_through_memory, kBlocks, kThreads, out.data());
    out[0] = 5;
    run(neighbours, kBlocks, kThreads, out.data());
    expect(out[0] == 20 + kThreads - 1 + 22);
  }
}

void broken(std::string const& name) {
  std::vector<int> out(kBlocks * kThreads, 0);
  int* const o = out.data();
  int sum = 0;
  unsigned arrived = 0;
  if (name == "no barrier") run(no_barrier, 1, kThreads, o);
  if (name == "no second barrier") run(no_second_barrier, 1, kThreads, o);
  if (name == "shuffle for a barrier") run(shuffle_for_a_barrier, 1, kThreads, o);
  if (name == "race of blocks") run(race_of_blocks, 2, kThreads, o);
  if (name == "not atomic") run(not_atomic, 1, kThreads, o);
  if (name == "no fence before") run(last_block<false, true>, 2, 32, o, &arrived, &sum);
  if (name == "no fence after") run(last_block<true, false>, 2, 32, o, &arrived, &sum);
  if (name == "divergent") run(divergent, 1, kThreads);
  if (name == "two barriers") run(two_barriers, 1, kThreads);
  if (name == "two instructions") run(two_instructions, 1, 32, o);
  if (name == "ended lanes") run(ended_lanes, 1, kThreads, o);
  if (name == "not in its mask") run(not_in_its_mask, 1, 32, o);
  if (name == "odd width") run(odd_width, 1, 32, o);
  if (name == "part of a warp") run(not_atomic, 1, 33, o);
  if (name == "too many threads") run(not_atomic, 1, 1056, o);
  if (name == "past static") run(past_static, 1, kThreads, o, 1);
  if (name == "past dynamic") run(past_dynamic, 1, kThreads, o);
  if (name == "lane outside the mask") {
    run(lane_outside_the_mask, 1, kThreads, o);
    expect(out[0] == 2 * 16);
  }
  if (name == "unwritten") {
    run(unwritten, 1, kThreads, o);
    expect(out[0] == kThreads);
  }
  if (name == "unwritten dynamic") {
    run(unwritten_dynamic, 1, kThreads, o);
    expect(out[0] == kThreads);
  }
  if (name == "in order") run(in_order, kBlocks, kThreads, o, &wrong);
  if (name == "nothing in between") run(nothing_in_between, kBlocks, kThreads, o, &wrong);
}

}  // namespace

int main(int arguments, char** argument) {
  for (int a = 2; a < arguments; ++a) {
    simt::seed = unsigned(std::atoi(argument[a]));
    simt::preempt = simt::seed % 2;
    right(argument[1]);
    broken(argument[1]);
  }
  return wrong != 0;
}
