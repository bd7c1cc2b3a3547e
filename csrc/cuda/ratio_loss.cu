// The clipped policy loss, its gradient and its metrics in one pass over the tokens.
//
// Each block sums consecutive tokens in fp64 and writes one column of partial sums; one more block
// adds the columns in order. Nothing is atomic: a call gives the same bits every time.
#include <limits>

#include "kernel.h"
#include "launch.h"

namespace ek {
namespace {

// Rows of the partial sums, each added by one warp.
enum Field { kLoss, kRatio, kLargest, kLogRatio, kExcess, kLow, kHigh, kActive, kFields };
constexpr int kWarp = 32;
constexpr int kThreads = kWarp * kFields;
constexpr int kTokens = 2;  // tokens whose loads are in flight per thread
constexpr int64_t kChunk = kTokens * kThreads;

struct Bounds {
  float low, high, dual, log_ratio;
};

struct Token {
  float logprob = 0.0f, old_logprob = 0.0f, advantage = 0.0f, weight = 0.0f;
  bool selected = false;
};

struct Term {
  float loss, grad, ratio, log_ratio, excess;
  bool low, high;
};

struct Exp {
  float value;   // exp(x)
  float excess;  // exp(x) - 1 - x
};

// |x| <= 80, or NaN. exp(x) = 2^n (1 + r + r^2 p(r)), r = x - n ln 2 in two parts; as
// csrc/cpu/ratio_loss.cpp does.
EK_DEVICE Exp exponential(float x) {
  float const magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, its low bits
  float const shifted = x * 1.44269504f + magic;
  float const n = shifted - magic;
  float const r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.98992871e-4f;  // Chebyshev, |r| <= ln 2 / 2: within 7e-10 of exp(r)
  p = p * r + 1.39336521e-3f;
  p = p * r + 8.33329838e-3f;
  p = p * r + 4.16664667e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 0.5f;
  p = p * r * r;
  float const power = __uint_as_float((__float_as_uint(shifted) + 127u) << 23);
  float const far = power * (r + p) + (power - 1.0f) - x;
  return {power * (1.0f + (r + p)), n == 0.0f ? p : far};
}

// Zeros where the token is not selected. A NaN reaches the loss and the gradient.
EK_DEVICE Term term_of(Token const& token, Bounds const& b) {
  float const advantage = token.selected ? token.advantage : 0.0f;
  float const free = token.selected ? token.logprob - token.old_logprob : 0.0f;
  float const below = free > b.log_ratio ? b.log_ratio : free;
  float const log_ratio = below < -b.log_ratio ? -b.log_ratio : below;
  Exp const exp = exponential(log_ratio);
  float const ratio = exp.value;
  float const at_least = ratio < b.low ? b.low : ratio;
  float const clipped = (at_least > b.high ? b.high : at_least) * advantage;
  float const plain = ratio * advantage;
  float const loss = -(clipped < plain ? clipped : plain);
  float const most = -b.dual * advantage;
  bool const low = advantage < 0.0f && (ratio < b.low || ratio > b.dual);
  bool const high = advantage > 0.0f && ratio > b.high;
  bool const outside = free > b.log_ratio || free < -b.log_ratio;
  bool const flat = (low || high || outside || advantage == 0.0f) && plain == plain;
  return {advantage < 0.0f && most < loss ? most : loss,
          flat ? 0.0f : -plain * token.weight,
          token.selected ? ratio : 0.0f,
          log_ratio,
          exp.excess,
          low,
          high};
}

// The larger of two numbers, and a NaN if either is one.
template <class T>
EK_DEVICE T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// A warp's total of a row of n numbers, in an order that n alone determines: their sum or, for
// kLargest, their maximum and at least 0.
EK_DEVICE double total(double const* row, int n, int field) {
  double sum = 0.0;
#pragma unroll 8
  for (int i = threadIdx.x % kWarp; i < n; i += kWarp)
    sum = field == kLargest ? larger(sum, row[i]) : sum + row[i];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    double const other = __shfl_xor_sync(0xffffffffu, sum, distance);
    sum = field == kLargest ? larger(sum, other) : sum + other;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    ratio_loss_tokens(RatioLoss const a, Bounds const bounds, int64_t const per_block) {
  EK_SHARED(sums, double[kFields][kThreads]);
  int const thread = threadIdx.x;
  int64_t const begin = blockIdx.x * per_block;
  int64_t const end = begin + per_block < a.tokens ? begin + per_block : a.tokens;
  // The sequence of the next token, and its place there; no division per token.
  int64_t sequence = (begin + thread) / a.length, place = (begin + thread) % a.length;
  int64_t const step = kThreads / a.length, rest = kThreads % a.length;
  double loss = 0.0, ratio = 0.0, log_ratio = 0.0, excess = 0.0;
  float largest = 0.0f;
  int low = 0, high = 0, active = 0;
  for (int64_t first = begin + thread; first < end; first += kChunk) {
    Token token[kTokens];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      int64_t const i = first + j * kThreads;
      if (i < end)
        token[j] = {a.logprob[i], a.old_logprob[i], a.advantage[i], a.weight[sequence],
                    a.selected[i] != 0};
      sequence += step, place += rest;
      if (place >= a.length) ++sequence, place -= a.length;
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      int64_t const i = first + j * kThreads;
      Term const term = term_of(token[j], bounds);
      if (i < end) a.grad[i] = term.grad;
      loss += static_cast<double>(term.loss) * token[j].weight;
      ratio += term.ratio;
      largest = larger(largest, term.ratio);
      log_ratio += term.log_ratio;
      excess += term.excess;
      low += term.low;
      high += term.high;
      active += term.grad != 0.0f;
    }
  }
  double const mine[kFields] = {loss,   ratio,       largest,      log_ratio,
                                excess, double(low), double(high), double(active)};
#pragma unroll
  for (int field = 0; field < kFields; ++field) sums[field][thread] = mine[field];
  __syncthreads();
  int const field = thread / kWarp;
  double const sum = total(sums[field], kThreads, field);
  if (thread % kWarp == 0) a.partials[field * kLossBlocks + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) ratio_loss_totals(RatioLoss const a, int const blocks) {
  int const field = threadIdx.x / kWarp;
  double const sum = total(a.partials + field * kLossBlocks, blocks, field);
  if (threadIdx.x % kWarp != 0) return;
  if (field == kLoss)
    *a.loss = static_cast<float>(sum);
  else if (field < kLow)
    a.sums[field - kRatio] = static_cast<float>(sum);
  else
    a.counts[field - kLow] = static_cast<int64_t>(sum);
}

}  // namespace

void ratio_loss(RatioLoss const& a, Stream stream) {
  Bounds const bounds = {static_cast<float>(1.0 - a.clip_low),
                         static_cast<float>(1.0 + a.clip_high),
                         a.dual_clip == 0.0f ? std::numeric_limits<float>::infinity() : a.dual_clip,
                         a.log_ratio_bound};
  int64_t const chunks = (a.tokens + kChunk - 1) / kChunk;
  int64_t const per_block = (chunks + kLossBlocks - 1) / kLossBlocks;
  int const blocks = chunks == 0 ? 0 : static_cast<int>((chunks + per_block - 1) / per_block);
  // A grid of no blocks is refused.
  if (blocks != 0)
    EK_LAUNCH(ratio_loss_tokens, dim3(blocks), dim3(kThreads), stream, a, bounds,
              per_block * kChunk);
  EK_LAUNCH(ratio_loss_totals, dim3(1), dim3(kThreads), stream, a, blocks);
}

}  // namespace ek
