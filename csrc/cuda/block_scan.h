// Sums over the threads before one: of a warp, and of a block.
#pragma once
#include "kernel.h"

namespace ek {

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of this lane and those before it.
template <class T>
EK_DEVICE T warp_scan(T mine) {
  int const lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    T const left = __shfl_up_sync(kAllLanes, mine, distance);
    if (lane >= distance) mine += left;
  }
  return mine;
}

template <class T>
EK_DEVICE T warp_sum(T mine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    mine += __shfl_xor_sync(kAllLanes, mine, distance);
  return mine;
}

template <class T>
struct Scan {
  T before;  // the sum of the threads before this one
  T total;   // the sum of all threads
};

// For a block of kWarps warps, at most 32, in one dimension. One barrier: another has to pass
// before `sums` is used again.
template <int kWarps, class T>
EK_DEVICE Scan<T> block_scan(T mine, T (&sums)[kWarps]) {
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T const upto = warp_scan(mine);
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  T const warps = warp_scan(lane < kWarps ? sums[lane] : T(0));
  T const left = __shfl_sync(kAllLanes, warps, warp == 0 ? 0 : warp - 1);
  return {(warp == 0 ? T(0) : left) + upto - mine, __shfl_sync(kAllLanes, warps, kWarps - 1)};
}

}  // namespace ek
