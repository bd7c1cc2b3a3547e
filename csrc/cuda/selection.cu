// The exact k-th largest of fp32 values, and which values these k are: all of it by one block, or
// one digit of the keys at a time, as `_radix.py` does. Everything is an integer, so the results
// are the same in whatever order the threads run. Nothing is allocated and the host waits for
// nothing.
#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "block_scan.h"
#include "keys.h"

namespace ek {
namespace {

#ifndef EK_SELECTION_THREADS  // tests also run with fewer, of which sanitizers take less time
#define EK_SELECTION_THREADS 1024
#endif
constexpr int kThreads = EK_SELECTION_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockRound = kWarps * kRound;  // keys of a block at once
constexpr int kHeld = 8;                      // rounds whose keys stay in registers
constexpr int kBins = 2 * kThreads;           // of a digit that is counted in shared memory
constexpr int kBits = kThreads == 1024 ? 11 : 8;
static_assert(kBins == 1 << kBits);

template <class Count>
struct Picked {
  unsigned digit;  // in which the k-th largest falls
  Count left;      // its rank among those with this digit, from 1
  Count equal;     // how many these are
};

// Two bins per thread, the highest in thread 0. One thread finds the bin, for k = 0 thread 0.
template <class Count>
EK_DEVICE void pick(unsigned digit, Count lower, Count upper, Count before, Count k,
                    Picked<Count>* picked) {
  if ((before >= k && threadIdx.x != 0) || k > before + upper + lower) return;
  *picked = k <= before + upper ? Picked<Count>{digit + 1, k - before, upper}
                                : Picked<Count>{digit, k - before - upper, lower};
}

struct Before {
  int above;  // keys above the threshold
  int ties;   // keys equal to it
};

// In the warps before this one. One barrier.
template <class Keys>
EK_DEVICE Before warps_before(Keys const& keys, unsigned threshold, Before (&warps)[kWarps]) {
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Before mine = {0, 0};
  keys.each([&](unsigned const(&key)[4], auto, auto) {
#pragma unroll
    for (int j = 0; j < 4; ++j) mine.above += key[j] > threshold, mine.ties += key[j] == threshold;
  });
  mine = {warp_sum(mine.above), warp_sum(mine.ties)};
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  mine = lane < warp ? warps[lane] : Before{0, 0};
  return {warp_sum(mine.above), warp_sum(mine.ties)};
}

// Which keys are above the threshold or among the first `quota` equal to it, and where these are.
// `ranked`: some but not all of those equal to it, or rows are wanted; else nothing is counted.
template <class Keys>
EK_DEVICE void select(Keys const& keys, int64_t count, unsigned threshold, int quota, bool ranked,
                      Before before, uint8_t* selected, int* rows) {
  if (!ranked) {
    bool const all = quota > 0;
    keys.each([&](unsigned const(&key)[4], auto at, auto is_aligned) {
      bool kept[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) kept[j] = key[j] > threshold || (all && key[j] == threshold);
      store_selected<decltype(is_aligned)::value>(selected, at, count, kept);
    });
    return;
  }
  keys.each([&](unsigned const(&key)[4], auto at, auto is_aligned) {
    // Those above the threshold in the lower half, those equal to it in the upper.
    int mine = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) mine += (key[j] > threshold) + ((key[j] == threshold) << 16);
    int const through = warp_scan(mine), rest = through - mine;
    int ties = before.ties + (rest >> 16);
    int rank = before.above + (rest & 0xffff) + (ties < quota ? ties : quota);
    bool kept[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bool const tie = key[j] == threshold;
      kept[j] = key[j] > threshold || (tie && ties < quota);
      if (rows != nullptr && kept[j]) rows[rank] = static_cast<int>(at) + j;
      rank += kept[j];
      ties += tie;
    }
    if (selected != nullptr) store_selected<decltype(is_aligned)::value>(selected, at, count, kept);
    int const warp = __shfl_sync(kAllLanes, through, 31);
    before.above += warp & 0xffff, before.ties += warp >> 16;
  });
}

// Three digits of the keys from the highest, each counted among the values that share those found,
// and the exact selection. A warp's values follow each other, so that its lanes know their order.
template <int kHeldRounds>
__global__ void __launch_bounds__(kThreads, 1)
    top_kernel(Values const values, double const share, Top const out, int const rounds) {
  EK_SHARED(histogram, uint2[kThreads]);
  EK_SHARED(sums, int[kWarps]);
  EK_SHARED(picked, Picked<int>);
  EK_SHARED(warps, Before[kWarps]);
  int const thread = threadIdx.x;
  uint2* const bins = &histogram[kThreads - 1 - thread];
  *bins = {0, 0};
  Keys<kHeldRounds> const keys(values, thread / 32 * rounds * kRound, rounds);
  __syncthreads();
  unsigned prefix = 0, fixed = 0;
  int n = 0, left = 0, k = 0;
#pragma unroll 1
  for (int shift = 32 - kBits;; shift = shift > kBits ? shift - kBits : 0) {
    keys.each([&](unsigned const(&key)[4], auto, auto) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (key[j] != kNoKey && ((key[j] ^ prefix) & fixed) == 0)
          atomicAdd(&histogram[0].x + (key[j] >> shift & (kBins - 1)), 1u);
    });
    __syncthreads();
    int const lower = bins->x, upper = bins->y;
    auto const scan = block_scan(lower + upper, sums);
    *bins = {0, 0};
    if (fixed == 0) {
      n = scan.total;
      left = k = static_cast<int>(selected_count(n, share));
    }
    pick<int>(2 * (kThreads - 1 - thread), lower, upper, scan.before, left, &picked);
    __syncthreads();
    // The last digit holds a bit of the one before it, the same in all that are counted.
    prefix |= picked.digit << shift;
    fixed |= (kBins - 1u) << shift;
    left = picked.left;
    if (shift == 0) break;
  }
  if (thread == 0) {
    *out.threshold = __uint_as_float(n > 0 ? bits_of_key(prefix) : kInfinity);
    *out.quota = left;
    *out.equal = picked.equal;
    if (out.number != nullptr) *out.number = k;
  }
  if (out.selected == nullptr && out.rows == nullptr) return;
  bool const ranked = out.rows != nullptr || left < picked.equal;
  Before before = {0, 0};
  if (ranked) before = warps_before(keys, prefix, warps);
  select(keys, values.count, prefix, left, ranked, before, out.selected, out.rows);
}

// Adds to `counts` those of a digit among the keys that begin with *prefix. Digits of few bits are
// counted in shared memory; of equal wide ones, one lane of a warp adds all.
template <bool kWide>
__global__ void __launch_bounds__(kThreads)
    histogram_kernel(Values const values, int64_t const* prefix, int const shift, int const bits,
                     int const prefix_bits, unsigned long long* counts, int const rounds) {
  EK_SHARED(histogram, unsigned[kBins]);
  int const thread = threadIdx.x;
  unsigned const most = (1u << bits) - 1;
  if (!kWide) {
    histogram[thread] = histogram[thread + kThreads] = 0;
    __syncthreads();
  }
  uint64_t const head = *prefix;
  int64_t const first = (int64_t(blockIdx.x) * kWarps + thread / 32) * rounds * kRound;
  Keys<0>(values, first, rounds).each([&](unsigned const(&key)[4], auto, auto) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bool const counted =
          key[j] != kNoKey && (prefix_bits == 0 || key[j] >> (32 - prefix_bits) == head);
      unsigned const digit = key[j] >> shift & most;
      if (!kWide) {
        if (counted) atomicAdd(&histogram[digit], 1u);
      } else {
        unsigned const same = __match_any_sync(kAllLanes, counted ? digit : ~0u);
        if (counted && thread % 32 == __ffs(same) - 1)
          atomicAdd(&counts[digit], static_cast<unsigned long long>(__popc(same)));
      }
    }
  });
  if (kWide) return;
  __syncthreads();
  for (unsigned bin = thread; bin <= most; bin += kThreads)
    if (histogram[bin] != 0)
      atomicAdd(&counts[bin], static_cast<unsigned long long>(histogram[bin]));
}

__global__ void __launch_bounds__(kThreads)
    pick_kernel(int64_t const* counts, int64_t const* local, int64_t const* prefix,
                int64_t const* remaining, double const share, int const shift, int const bits,
                int64_t* new_prefix, int64_t* new_remaining, int64_t* equal, float* value) {
  EK_SHARED(sums, int64_t[kWarps]);
  EK_SHARED(picked, Picked<int64_t>);
  int const digit = (1 << bits) - 2 - 2 * static_cast<int>(threadIdx.x);
  int64_t const lower = digit >= 0 ? counts[digit] : 0, upper = digit >= 0 ? counts[digit + 1] : 0;
  auto const scan = block_scan(lower + upper, sums);
  int64_t const k = remaining == nullptr ? selected_count(scan.total, share) : *remaining;
  if (digit >= 0) pick<int64_t>(digit, lower, upper, scan.before, k, &picked);
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t const found = *prefix << bits | picked.digit;
  *new_prefix = found;
  *new_remaining = picked.left;
  *equal = local[picked.digit];
  unsigned const key = static_cast<unsigned>(found << shift);
  *value = __uint_as_float(scan.total > 0 ? bits_of_key(key) : kInfinity);
}

// How many keys of each block are equal to the threshold.
__global__ void __launch_bounds__(kThreads)
    ties_kernel(Values const values, float const* threshold, int64_t* counts, int const rounds) {
  EK_SHARED(sums, int[kWarps]);
  unsigned const key_of_threshold = key_of(__float_as_uint(*threshold));
  int64_t const first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * rounds * kRound;
  int ties = 0;
  Keys<0>(values, first, rounds).each([&](unsigned const(&key)[4], auto, auto) {
#pragma unroll
    for (int j = 0; j < 4; ++j) ties += key[j] == key_of_threshold;
  });
  int const total = block_scan(ties, sums).total;
  if (threadIdx.x == 0) counts[blockIdx.x] = total;
}

// Each block takes what those before it leave of the quota.
__global__ void __launch_bounds__(kThreads)
    largest_kernel(Values const values, float const* threshold, int64_t const* quota,
                   int64_t const* counts, uint8_t* selected, int const rounds) {
  EK_SHARED(sums, int64_t[kWarps]);
  EK_SHARED(warps, Before[kWarps]);
  unsigned const key_of_threshold = key_of(__float_as_uint(*threshold));
  int64_t const first = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * rounds * kRound;
  Keys<0> const keys(values, first, rounds);
  int64_t earlier = 0;
  for (unsigned b = threadIdx.x; b < blockIdx.x; b += kThreads) earlier += counts[b];
  int64_t const left = *quota - block_scan(earlier, sums).total;
  bool const ranked = left > 0 && left < counts[blockIdx.x];
  Before before = {0, 0};
  if (ranked) before = warps_before(keys, key_of_threshold, warps);
  int const quota_here = static_cast<int>(left < 0 ? 0 : left > INT_MAX ? INT_MAX : left);
  select(keys, values.count, key_of_threshold, quota_here, ranked, before, selected, nullptr);
}

// Rounds per block such that at most `most` blocks read all values.
int rounds_of(Values const& values, int64_t most) {
  return static_cast<int>((values.count + most * kBlockRound - 1) / (most * kBlockRound));
}
unsigned blocks_of(Values const& values, int rounds) {
  int64_t const block = int64_t{kBlockRound} * rounds;
  return static_cast<unsigned>((values.count + block - 1) / block);
}

}  // namespace

void top(Values const& values, double share, Top const& out, Stream stream) {
  if (values.count > kOneBlock)
    throw std::runtime_error("top takes at most " + std::to_string(kOneBlock) + " values; got " +
                             std::to_string(values.count));
  int const rounds = rounds_of(values, 1);
  bool const fit = aligned(values.value, sizeof(float4)) && aligned(values.mask, sizeof(uchar4)) &&
                   aligned(out.selected, sizeof(uchar4));
  if (fit && rounds <= kHeld)
    EK_LAUNCH(top_kernel<kHeld>, dim3(1), dim3(kThreads), stream, values, share, out, rounds);
  else
    EK_LAUNCH(top_kernel<0>, dim3(1), dim3(kThreads), stream, values, share, out, rounds);
}

void radix_histogram(Values const& values, int64_t const* prefix, int shift, int bits,
                     int prefix_bits, int64_t* counts, Stream stream) {
  if (values.count == 0) return;
  // Two rounds at least, for every block adds all of its bins.
  int const rounds = std::max(2, rounds_of(values, kSelectBlocks));
  dim3 const blocks(blocks_of(values, rounds)), threads(kThreads);
  auto* const sums = reinterpret_cast<unsigned long long*>(counts);
  auto* const kernel = bits <= kBits ? histogram_kernel<false> : histogram_kernel<true>;
  EK_LAUNCH(kernel, blocks, threads, stream, values, prefix, shift, bits, prefix_bits, sums,
            rounds);
}

void radix_pick(int64_t const* counts, int64_t const* local, int64_t const* prefix,
                int64_t const* remaining, double share, int shift, int bits, int64_t* new_prefix,
                int64_t* new_remaining, int64_t* equal, float* value, Stream stream) {
  if (bits < 1 || bits > kBits)
    throw std::runtime_error("radix_pick takes 1 to " + std::to_string(kBits) + " bits; got " +
                             std::to_string(bits));
  EK_LAUNCH(pick_kernel, dim3(1), dim3(kThreads), stream, counts, local, prefix, remaining, share,
            shift, bits, new_prefix, new_remaining, equal, value);
}

void select_largest(Values const& values, float const* threshold, int64_t const* quota,
                    int64_t* counts, uint8_t* selected, Stream stream) {
  if (values.count == 0) return;
  int const rounds = rounds_of(values, kSelectBlocks);
  dim3 const blocks(blocks_of(values, rounds)), threads(kThreads);
  EK_LAUNCH(ties_kernel, blocks, threads, stream, values, threshold, counts, rounds);
  EK_LAUNCH(largest_kernel, blocks, threads, stream, values, threshold, quota, counts, selected,
            rounds);
}

}  // namespace ek
