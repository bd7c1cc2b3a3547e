#include <algorithm>
#include <limits>

#include "bits.h"
#include "problem.h"
#include "radix_histogram.h"
#include "ratio_loss.h"
#include "tests.h"

namespace {

// A key that orders like the numbers: -0 equals +0, and a NaN is the largest.
std::uint32_t key_of(float x) {
  if (x != x) return 0xffffffffu;
  const auto bits = bits_as<std::uint32_t>(x == 0 ? 0.0f : x);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

struct Tokens {
  std::vector<float> logprob, old_logprob, advantage, weight;
  std::vector<std::uint8_t> selected;
  std::int64_t sequences, length;

  Tokens(std::int64_t sequences, std::int64_t length) : sequences(sequences), length(length) {
    Random random;
    for (std::int64_t i = 0; i < sequences * length; ++i) {
      old_logprob.push_back(float(-3 * random.uniform()));
      const double spread = i % 50 == 7 ? 30 : i % 3 == 0 ? 0 : 0.3;
      const double step = spread * random.normal();
      logprob.push_back(float(old_logprob[i] + step));
      advantage.push_back(i % 11 == 0 ? 0 : float(random.normal()));
      selected.push_back(random.uniform() < 0.8);
    }
    for (std::int64_t s = 0; s < sequences; ++s) weight.push_back(float(random.uniform() / length));
  }
};

struct RatioOutcome {
  std::vector<float> values;  // loss, sums, gradients
  std::int64_t counts[3];
};

RatioOutcome run(const Tokens& t, const entropy_kernels::RatioBounds& bounds, int threads) {
  RatioOutcome out{std::vector<float>(5 + t.logprob.size()), {}};
  float* values = out.values.data();
  entropy_kernels::ratio_loss({t.logprob.data(), t.old_logprob.data(), t.advantage.data(),
                               t.selected.data(), t.weight.data(), t.sequences, t.length},
                              bounds, threads, {values, values + 5, values + 1, out.counts});
  return out;
}

// The formula, token by token, in fp64 from the fp32 log ratio.
void compare(const Tokens& t, const entropy_kernels::RatioBounds& b, Report& report) {
  const RatioOutcome got = run(t, b, 2);
  double loss = 0, size = 0, sums[4] = {}, sizes[4] = {};
  std::int64_t counts[3] = {};
  for (std::int64_t i = 0; i < t.sequences * t.length; ++i) {
    if (t.selected[i] == 0) {
      report.require(got.values[5 + i] == 0,
                     "ratio_loss: no gradient for tokens that are not selected");
      continue;
    }
    const double log_ratio = t.logprob[i] - t.old_logprob[i], a = t.advantage[i];
    const double bounded = std::clamp(log_ratio, double(-b.log_ratio), double(b.log_ratio));
    const double ratio = std::exp(bounded), weight = t.weight[i / t.length];
    const double clipped = std::clamp(ratio, double(b.low), double(b.high));
    double one = -std::min(ratio * a, clipped * a);
    if (a < 0) one = std::min(one, -double(b.dual) * a);
    const bool low = a < 0 && (ratio < b.low || ratio > b.dual), high = a > 0 && ratio > b.high;
    const bool flat = low || high || std::fabs(log_ratio) > b.log_ratio || a == 0;
    const double gradient = flat ? 0 : -ratio * a * weight;
    report.close(got.values[5 + i], gradient, 4e-7 * std::fabs(gradient), "ratio_loss gradient",
                 long(i));
    loss += one * weight, size += std::fabs(one * weight);
    const double terms[] = {ratio, 0, bounded, std::expm1(bounded) - bounded};
    for (int k = 0; k < 4; ++k) sums[k] += terms[k], sizes[k] += std::fabs(terms[k]);
    sums[1] = sizes[1] = std::max(sums[1], ratio);
    counts[0] += low, counts[1] += high, counts[2] += gradient != 0;
  }
  report.close(got.values[0], loss, 4e-7 * size, "ratio_loss loss", 0);
  for (int k = 0; k < 4; ++k)
    report.close(got.values[1 + k], sums[k], (k == 3 ? 2e-6 : 4e-7) * sizes[k], "ratio_loss sum",
                 k);
  for (int k = 0; k < 3; ++k)
    report.require(got.counts[k] == counts[k], "ratio_loss counts its tokens");
}

}  // namespace

void test_radix_histogram(Report& report) {
  Random random;
  std::vector<float> values = {0.0f, -0.0f, 1e-45f, -1e-45f, 1, -1, 3.4e38f, -3.4e38f};
  for (const std::uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc00000u, 0x7f800001u})
    values.push_back(bits_as<float>(bits));
  std::vector<std::uint8_t> mask;
  while (values.size() < 200003) values.push_back(bits_as<float>(std::uint32_t(random.engine())));
  for (std::size_t i = 0; i < values.size(); ++i) mask.push_back(random.uniform() < 0.6);
  const entropy_kernels::RadixDigit digits[] = {{0, 0, 21, 11},
                                                {key_of(1) >> 21, 11, 10, 11},
                                                {key_of(values[20]) >> 10, 22, 0, 10},
                                                {0, 0, 13, 19}};
  for (const auto& digit : digits)
    for (const bool masked : {false, true}) {
      std::vector<std::int64_t> want(std::size_t{1} << digit.bits, 5), got = want;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::uint32_t key = key_of(values[i]);
        if (masked && mask[i] == 0) continue;
        if (digit.prefix_bits != 0 && key >> (32 - digit.prefix_bits) != digit.prefix) continue;
        ++want[key >> digit.shift & ((1u << digit.bits) - 1)];
      }
      entropy_kernels::radix_histogram(values.data(), masked ? mask.data() : nullptr,
                                       std::int64_t(values.size()), digit, got.data());
      report.require(got == want, "radix_histogram counts " + std::to_string(digit.bits) + " bits");
    }
}

void test_ratio_loss(Report& report) {
  const entropy_kernels::RatioBounds bounds{0.8f, 1.28f, 3.0f, 20.0f};
  entropy_kernels::RatioBounds no_dual = bounds;
  no_dual.dual = std::numeric_limits<float>::infinity();
  for (const Tokens& tokens : {Tokens(1, 1), Tokens(7, 1021), Tokens(3, 40000)}) {
    compare(tokens, bounds, report);
    compare(tokens, no_dual, report);
    const RatioOutcome one = run(tokens, bounds, 1), three = run(tokens, bounds, 3);
    report.require(one.values == three.values,
                   "ratio_loss: the same bits at any number of threads");
  }
  Tokens sick(7, 1021);
  sick.logprob[3000] = std::numeric_limits<float>::quiet_NaN();
  sick.selected[3000] = 1;
  const RatioOutcome got = run(sick, bounds, 2);
  for (const int i : {0, 1, 2, 3, 4, 5 + 3000})
    report.require(got.values[i] != got.values[i],
                   "ratio_loss: a NaN reaches every sum of its token");
  for (std::size_t i = 5; i < got.values.size(); ++i)
    report.require(i == 5 + 3000 || got.values[i] == got.values[i],
                   "ratio_loss: a NaN is in no other token's gradient");
}
