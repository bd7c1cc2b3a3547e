#include "ratio_loss.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "bits.h"
#include "target_clones.h"

namespace entropy_kernels {
namespace {

constexpr std::int64_t kBlock = 512;
// The tokens that one thread sums, whatever the number of threads.
constexpr std::int64_t kPart = 1 << 15;
// Sums that run side by side, so that the compiler makes vectors of them.
constexpr int kLanes = 16;

struct Sums {
  double loss = 0, ratio = 0, log_ratio = 0, excess = 0;
  float largest = 0;
  std::int64_t low = 0, high = 0, active = 0;
};

// The terms of a block's tokens, followed by zeros up to a whole number of lanes.
struct Terms {
  float loss[kBlock], ratio[kBlock], log_ratio[kBlock], excess[kBlock];
};

struct Counts {
  std::int32_t low, high, active;
};

struct Exp {
  float value;   // exp(x)
  float excess;  // exp(x) - 1 - x
};

// |x| <= 80, or NaN. exp(x) = 2^n (1 + r + r^2 p(r)), r = x - n ln 2 in two parts.
inline Exp exponential(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, its low bits
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.98992871e-4f;  // Chebyshev, |r| <= ln 2 / 2: within 7e-10 of exp(r)
  p = p * r + 1.39336521e-3f;
  p = p * r + 8.33329838e-3f;
  p = p * r + 4.16664667e-2f;
  p = p * r + 1.66666672e-1f;
  p = p * r + 0.5f;
  p = p * r * r;
  const float power = bits_as<float>((bits_as<std::uint32_t>(shifted) + 127u) << 23);
  const float far = power * (r + p) + (power - 1.0f) - x;
  return {power * (1.0f + (r + p)), n == 0.0f ? p : far};
}

// x if all bits of `mask` are set, 0 if none is. The compiler does not vectorize a choice by bytes.
inline float masked(float x, std::uint32_t mask) {
  return bits_as<float>(bits_as<std::uint32_t>(x) & mask);
}

// Computes tokens [begin, begin + n) without a branch. A NaN reaches the loss and the gradient.
TARGET_CLONES
Counts find_terms(const RatioTokens& tokens, const RatioBounds& bounds, std::int64_t begin, int n,
                  float weight, float* __restrict grad, Terms& __restrict terms) {
  const float* __restrict logprob = tokens.logprob + begin;
  const float* __restrict old_logprob = tokens.old_logprob + begin;
  const float* __restrict advantages = tokens.advantage + begin;
  const std::uint8_t* __restrict selected = tokens.selected + begin;
  const RatioBounds b = bounds;
  Counts counts{};
  for (int i = 0; i < n; ++i) {
    const std::uint32_t mask = 0u - (selected[i] != 0);
    const float advantage = masked(advantages[i], mask);
    const float log_ratio = masked(logprob[i] - old_logprob[i], mask);
    const float below = log_ratio > b.log_ratio ? b.log_ratio : log_ratio;
    const float bounded = below < -b.log_ratio ? -b.log_ratio : below;
    const Exp exp = exponential(bounded);
    const float ratio = exp.value;
    const float at_least = ratio < b.low ? b.low : ratio;
    const float clipped = (at_least > b.high ? b.high : at_least) * advantage;
    const float plain = ratio * advantage;
    const float loss = -(clipped < plain ? clipped : plain);
    const float most = -b.dual * advantage;
    const bool low = (advantage < 0.0f) & ((ratio < b.low) | (ratio > b.dual));
    const bool high = (advantage > 0.0f) & (ratio > b.high);
    const bool outside = (log_ratio > b.log_ratio) | (log_ratio < -b.log_ratio);
    const bool flat = (low | high | outside | (advantage == 0.0f)) & (plain == plain);
    const float gradient = flat ? 0.0f : -plain * weight;
    grad[i] = gradient;
    terms.loss[i] = ((advantage < 0.0f) & (most < loss)) ? most : loss;
    terms.ratio[i] = masked(ratio, mask);
    terms.log_ratio[i] = bounded;
    terms.excess[i] = exp.excess;
    counts.low += low;
    counts.high += high;
    counts.active += gradient != 0.0f;
  }
  for (int i = n; i % kLanes != 0; ++i)
    terms.loss[i] = terms.ratio[i] = terms.log_ratio[i] = terms.excess[i] = 0.0f;
  return counts;
}

TARGET_CLONES
void add_terms(const Terms& terms, int n, float weight, Sums& sums) {
  double loss[kLanes] = {}, ratio[kLanes] = {}, log_ratio[kLanes] = {}, excess[kLanes] = {};
  float largest[kLanes] = {};
  for (int i = 0; i < n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) loss[j] += terms.loss[i + j];
    for (int j = 0; j < kLanes; ++j) ratio[j] += terms.ratio[i + j];
    for (int j = 0; j < kLanes; ++j) log_ratio[j] += terms.log_ratio[i + j];
    for (int j = 0; j < kLanes; ++j) excess[j] += terms.excess[i + j];
    for (int j = 0; j < kLanes; ++j)
      largest[j] = terms.ratio[i + j] > largest[j] ? terms.ratio[i + j] : largest[j];
  }
  double weighted = 0;
  for (int j = 0; j < kLanes; ++j) {
    weighted += loss[j];
    sums.ratio += ratio[j];
    sums.log_ratio += log_ratio[j];
    sums.excess += excess[j];
    sums.largest = std::max(sums.largest, largest[j]);
  }
  sums.loss += weighted * weight;
}

// Sums tokens [begin, end), in blocks that lie within one sequence.
Sums sum_part(const RatioTokens& tokens, const RatioBounds& bounds, std::int64_t begin,
              std::int64_t end, float* grad) {
  Sums sums;
  Terms terms;
  while (begin < end) {
    const std::int64_t sequence = begin / tokens.length;
    const std::int64_t last = std::min(end, (sequence + 1) * tokens.length);
    const int n = static_cast<int>(std::min(kBlock, last - begin));
    const float weight = tokens.weight[sequence];
    const Counts counts = find_terms(tokens, bounds, begin, n, weight, grad + begin, terms);
    add_terms(terms, n, weight, sums);
    sums.low += counts.low;
    sums.high += counts.high;
    sums.active += counts.active;
    begin += n;
  }
  return sums;
}

}  // namespace

void ratio_loss(const RatioTokens& tokens, const RatioBounds& bounds, int threads,
                const RatioResults& out) {
  const std::int64_t n = tokens.sequences * tokens.length;
  const std::int64_t parts = (n + kPart - 1) / kPart;
  std::vector<Sums> sums(parts);
  threads = static_cast<int>(std::clamp<std::int64_t>(parts / 2, 1, threads));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t part = 0; part < parts; ++part)
    sums[part] = sum_part(tokens, bounds, part * kPart, std::min(n, (part + 1) * kPart), out.grad);
  Sums all;
  for (const Sums& part : sums) {
    all.loss += part.loss;
    all.ratio += part.ratio;
    all.log_ratio += part.log_ratio;
    all.excess += part.excess;
    all.largest = std::max(all.largest, part.largest);
    all.low += part.low;
    all.high += part.high;
    all.active += part.active;
  }
  // A maximum drops NaNs, a sum does not.
  if (all.ratio != all.ratio) all.largest = std::numeric_limits<float>::quiet_NaN();
  *out.loss = static_cast<float>(all.loss);
  out.sums[0] = static_cast<float>(all.ratio);
  out.sums[1] = all.largest;
  out.sums[2] = static_cast<float>(all.log_ratio);
  out.sums[3] = static_cast<float>(all.excess);
  out.counts[0] = all.low;
  out.counts[1] = all.high;
  out.counts[2] = all.active;
}

}  // namespace entropy_kernels
