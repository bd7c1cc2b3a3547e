#pragma once

#include <cstdint>

namespace entropy_kernels {

// Of `sequences` x `length` tokens. fp32 but for kept: bytes, non-zero is selected.
struct RatioTokens {
  const float* logprob;
  const float* old_logprob;
  const float* advantage;
  const std::uint8_t* kept;
  const float* weight;  // one a sequence: what its tokens' losses are multiplied with
  std::int64_t sequences;
  std::int64_t length;
};

// Of the ratio: 1 - clip_low, 1 + clip_high, and the dual clip or inf. Of |log ratio|: at most 80.
struct RatioBounds {
  float low;
  float high;
  float dual;
  float log_ratio;
};

// loss: one value. grad: one a token. sums: of ratio, its largest, of log ratio, and of
// ratio - 1 - log ratio, over the kept tokens. counts: clipped low, clipped high, with a gradient.
struct RatioResults {
  float* loss;
  float* grad;
  float* sums;
  std::int64_t* counts;
};

// The clipped policy loss, its gradient with respect to logprob, and what metrics need, in one
// pass. Sums are fp64 over fixed parts: the same bits at any number of threads.
void ratio_loss(const RatioTokens& tokens, const RatioBounds& bounds, int threads,
                const RatioResults& out);

}  // namespace entropy_kernels
