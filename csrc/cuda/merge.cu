// Results of every row, from the partial sums of its vocabulary splits.
//
// T tokens, V vocabulary, S vocabulary splits.
#include <cmath>

#include "kernel.h"
#include "launch.h"
#include "row_sums.h"

namespace ek {
namespace {

constexpr int kThreads = 512;
// Splits whose loads are in flight per thread.
constexpr int at_once(bool statistics) { return statistics ? 2 : 4; }
// Rows of a block: the fewest that fill a sector of memory, or a warp where blocks abound.
constexpr int kFewRows = 8, kManyRows = 32, kAbound = 8192;

// One row's sums over the splits threadIdx.y, threadIdx.y + blockDim.y and so on.
template <bool kStatistics>
EK_DEVICE RowSums sums_of_thread(Merge const& a, int row, float scale) {
  constexpr int kAtOnce = at_once(kStatistics);
  RowSums sums;
  int const step = blockDim.y;
  for (int first = threadIdx.y; first < a.splits; first += kAtOnce * step) {
    RowSums part[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (j * step < a.splits - first)
        part[j] = load_sums<kStatistics>(a.partials, first + j * step, a.splits, row, a.rows);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sums = merged<kStatistics>(sums, part[j], scale);
  }
  return sums;
}

// The sums of all threads of a row, for threadIdx.y = 0. The order depends on S and T alone.
template <bool kStatistics>
EK_DEVICE RowSums sums_of_block(RowSums sums, float scale) {
  EK_SHARED(upper, float[(kStatistics ? 7 : 4) * kThreads / 2]);
  int const y = threadIdx.y, row = threadIdx.x, rows = blockDim.x;
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (half <= y && y < 2 * half) store_sums<kStatistics>(upper, y - half, half, row, rows, sums);
    __syncthreads();
    if (y < half)
      sums = merged<kStatistics>(sums, load_sums<kStatistics>(upper, y, half, row, rows), scale);
    __syncthreads();
  }
  return sums;
}

// Results in nats: zeros where the target is ignored, NaN where a row has no answer.
template <bool kStatistics>
__global__ void __launch_bounds__(kThreads) merge_splits(Merge const a) {
  int64_t const t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  bool const inside = t < a.rows;
  int64_t const target = inside ? a.target[t] : a.ignore_index;
  bool const valid = inside && target != a.ignore_index;
  int const row = valid && a.slot != nullptr ? a.slot[t] : static_cast<int>(t);
  float const temperature =
      valid && a.temperature != nullptr ? a.temperature[t * a.stride_temperature] : 1.0f;
  float const scale = kLog2e / temperature;

  RowSums sums;
  if (valid) sums = sums_of_thread<kStatistics>(a, row, scale);
  sums = sums_of_block<kStatistics>(sums, scale);
  if (threadIdx.y != 0 || !inside) return;

  float const rest = sums.s + (sums.n - 1.0f);
  float const log_sum = log1p(rest), most = 1.0f / (1.0f + rest);
  // The target's logit was rounded elsewhere, and may exceed the maximum.
  float above = valid ? (a.target_logit[row] - sums.m) / temperature : 0.0f;
  if (above > 0.0f) above = 0.0f;
  bool const defined = sums.m > kLowest && temperature > 0.0f && temperature < INFINITY &&
                       target >= 0 && target < a.vocabulary && rest == rest;
  auto const write = [&](float* out, float x) { out[t] = !valid ? 0.0f : defined ? x : NAN; };
  write(a.logprob, above - log_sum);
  write(a.entropy, log_sum - kLn2 * sums.u / (1.0f + rest));
  write(a.logsumexp, sums.m / temperature + log_sum);
  write(a.max, sums.m);
  write(a.log_sum, log_sum);
  if constexpr (kStatistics) {
    float const apart = sums.w * rest - sums.u * sums.u;
    float const varentropy = kLn2 * kLn2 * (sums.w + (apart < 0.0f ? 0.0f : apart));
    float const squares = (sums.q + sums.n) * most * most;
    int64_t const field = a.rows;
    write(a.statistics, varentropy * most * most);
    write(a.statistics + field, most);
    write(a.statistics + 2 * field, squares);
    write(a.statistics + 3 * field, kLn2 * sums.r * most * most - log_sum * squares);
  }
}

}  // namespace

void merge(Merge const& a, Stream stream) {
  if (a.rows == 0) return;
  int const rows = a.rows < kAbound ? kFewRows : kManyRows;
  int const each = at_once(a.statistics != nullptr);
  int side_by_side = 32 / rows;
  while (side_by_side * each < a.splits && side_by_side * rows < kThreads) side_by_side *= 2;
  dim3 const grid((int64_t(a.rows) + rows - 1) / rows), block(rows, side_by_side);
  if (a.statistics == nullptr)
    EK_LAUNCH(merge_splits<false>, grid, block, stream, a);
  else
    EK_LAUNCH(merge_splits<true>, grid, block, stream, a);
}

}  // namespace ek
