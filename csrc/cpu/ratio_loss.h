// The clipped policy loss over the probability ratio, per token.
#pragma once

#include <cstdint>

namespace entropy_kernels {

// The inputs of `sequences` x `length` tokens.
struct RatioTokens {
  const float* logprob;
  const float* old_logprob;
  const float* advantage;
  const std::uint8_t* selected;  // non-zero for tokens of the loss
  const float* weight;           // [sequences], the factor of its tokens' losses
  std::int64_t sequences;
  std::int64_t length;
};

struct RatioBounds {
  float low;        // 1 - clip_low
  float high;       // 1 + clip_high
  float dual;       // the dual clip, or inf
  float log_ratio;  // the bound of |log ratio|, at most 80
};

struct RatioResults {
  float* loss;  // one value
  float* grad;  // [sequences * length], with respect to logprob
  // [4], over the selected tokens: the sum of the ratio, the largest ratio, the sum of log ratio,
  // the sum of ratio - 1 - log ratio
  float* sums;
  std::int64_t* counts;  // [3]: tokens clipped low, clipped high, with a gradient
};

// The clipped policy loss, its gradient, and the sums of the metrics, in one pass. Sums are fp64
// over fixed parts, so the bits are the same at any number of threads.
void ratio_loss(const RatioTokens& tokens, const RatioBounds& bounds, int threads,
                const RatioResults& out);

}  // namespace entropy_kernels
