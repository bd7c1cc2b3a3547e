// The sums over the vocabulary behind log-probability and entropy; tiles of logits are added to
// them.
//
// Relative to the running maximum m of a token, and without one logit that equals it,
//   s = sum_j exp(d_j),  t = sum_j d_j exp(d_j),  d_j = (z_j - m) / temperature
// so that H = log1p(s) - t / (1 + s) keeps its digits for entropies of 1e-12. Sums of a tile are
// fp32, sums of tiles fp64.
#pragma once

#include <cmath>
#include <limits>

#include "rows.h"
#include "statistics.h"

namespace EK_ISA {

using entropy_kernels::ForwardCall;
using entropy_kernels::ForwardRows;

static_assert(kTileRows * kShare <= 1);

constexpr float kLowest = -1e30f;          // the maximum's start; finite, so -inf - m is no NaN
constexpr float kLowestExponent = -87.0f;  // exp of less is subnormal

// Makes s and t relative to a maximum that is larger by -shift: t <- a (t + (1 + s) shift). The new
// maximum stays out; the old one, if there was one, is in `sum`. a = exp(shift).
static inline void move_sums(double shift, double a, double sum, double& s, double& t) {
  t = a * t + (a == 0 ? 0 : a * sum * shift);
  s = a * sum;
}

// Whether s holds no more than maxima and logits of -inf over `count` logits: exp(-87) each.
static inline bool is_vanishing(double s, std::int64_t count) {
  return s <= 1.7e-38 * double(count);
}

// The sums of a panel of 64 tokens over the part of the vocabulary that has been walked. s leaves
// one maximum out and holds those that tie with it. `present` is 0 before the first logit, then 1.
// S is Statistics or NoStatistics.
template <class S>
struct Running {
  float max[kPanel], present[kPanel], target[kPanel], temperature[kPanel];
  double s[kPanel], t[kPanel];
  S statistics;

  void start(const Head& head, const Rows& rows, std::int64_t first) {
    for (int i = 0; i < kPanel; ++i) {
      const bool scaled = head.temperature != nullptr && first + i < rows.count;
      max[i] = kLowest;
      temperature[i] = scaled ? head.temperature[rows[first + i]] : 1.0f;
      present[i] = target[i] = 0.0f;
      s[i] = t[i] = 0.0;
      statistics.start(i);
    }
  }

  // Makes the sums relative to a larger maximum, which stays out.
  void move(int i, float to) {
    const double shift = (double(max[i]) - double(to)) / temperature[i];
    const double a = std::exp(shift), sum = s[i] + present[i];
    statistics.move(i, shift, a, t[i], sum, present[i]);
    move_sums(shift, a, sum, s[i], t[i]);
    present[i] = 1.0f;
    max[i] = to;
  }

  // Adds the sums over a later part of the vocabulary.
  void merge(Running other, int i) {
    const bool higher = other.present[i] != 0 && (present[i] == 0 || other.max[i] > max[i]);
    statistics.join(other.statistics, i, higher);
    if (other.present[i] == 0) {
      s[i] += other.s[i];  // may be a NaN
    } else {
      if (higher)
        move(i, other.max[i]);
      else
        other.move(i, max[i]);
      s[i] += other.s[i];
      t[i] += other.t[i];
      statistics.add(other.statistics, i);
    }
    target[i] += other.target[i];
  }
};

static void cap_tile(float softcap, std::int64_t rows, float* tile) {
  for (std::int64_t i = 0; i < rows * kPanel; ++i) tile[i] = softcap * std::tanh(tile[i] / softcap);
}

// Moves the sums to the new maxima of a tile, whose first column is `column`, and makes those
// logits -inf, which leaves them out. A comparison waits for that of the row before, so the panel's
// vectors go side by side.
template <class S>
static void take_maxima(float* tile, std::int64_t column, std::int64_t rows, Running<S>& running) {
  float highest[kPanel];
  for (int j = 0; j < kPanel; j += kVectors * kLanes) {
    Vec top[kVectors];
    typename S::Logits logits[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) top[v] = load(running.max + j + v * kLanes);
    for (std::int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec z = load(tile + r * kPanel + j + v * kLanes);
        top[v] = larger(z, top[v]);
        logits[v].add(z);
      }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(highest + j + v * kLanes, top[v]);
    for (int v = 0; v < kVectors; ++v) running.statistics.add(logits[v], j + v * kLanes);
  }
  if (std::memcmp(highest, running.max, sizeof highest) == 0) return;
  for (int i = 0; i < kPanel; ++i) {
    if (!(highest[i] > running.max[i])) continue;
    std::int64_t r = 0;
    while (tile[r * kPanel + i] != highest[i]) ++r;
    tile[r * kPanel + i] = -std::numeric_limits<float>::infinity();
    running.move(i, highest[i]);
    running.statistics.rise(i, column + r);
  }
}

// Adds a tile of logits, whose first column is `column`, to the sums; overwrites some of the
// logits.
template <bool kScaled, class S>
static void reduce_tile(float* tile, std::int64_t column, std::int64_t rows, Running<S>& running) {
  take_maxima(tile, column, rows, running);
  for (int j = 0; j < kPanel; j += kLanes) {
    const Vec max = load(running.max + j), temperature = load(running.temperature + j);
    const Vec low = splat(kLowestExponent);
    Vec s{}, t{};
    typename S::Tile statistics;
    for (std::int64_t r = 0; r < rows; ++r) {
      Vec d = load(tile + r * kPanel + j) - max;
      if (kScaled) d = d / temperature;
      d = larger(low, d);
      const Vec e = exp_nonpositive(d);
      s += e;
      t += e * d;
      statistics.add(e, d);
    }
    running.statistics.add(statistics, j);
    float s_out[kLanes], t_out[kLanes];
    store(s_out, s), store(t_out, t);
    for (int i = 0; i < kLanes; ++i) {
      running.s[j + i] += s_out[i];
      running.t[j + i] += t_out[i];
    }
  }
}

// Takes the targets' logits from the tile of the weight's rows [first, first + height).
template <class S>
static void take_targets(const std::int64_t* target, const std::int64_t* token, std::int64_t count,
                         std::int64_t first, std::int64_t height, const float* tile,
                         Running<S>& running) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = target[token[i]] - first;
    if (row >= 0 && row < height) running.target[i] = tile[row * kPanel + i];
  }
}

// Writes what forward computes of token `i` of a panel.
template <class S>
static void finish(const ForwardCall& call, const Running<S>& running, int i, std::int64_t token) {
  const Head& head = call.head;
  const ForwardRows& out = call.out;
  const double temperature = head.temperature == nullptr ? 1.0 : head.temperature[token];
  const bool vanishing = is_vanishing(running.s[i], head.vocabulary);
  const double s = vanishing ? 0.0 : running.s[i], t = vanishing ? 0.0 : running.t[i];
  const double log_sum = std::log1p(s);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  // A row of -inf alone has no distribution, nor has a row with inf.
  const double highest = running.max[i], infinity = std::numeric_limits<double>::infinity();
  const double max = highest > kLowest && highest < infinity && s == s ? highest : nan;
  out.max[token] = float(max);
  out.log_sum[token] = float(max - max + log_sum);
  out.logprob[token] = float((running.target[i] - max) / temperature - log_sum);
  out.entropy[token] = float(max - max + log_sum - t / (1.0 + s));
  out.logsumexp[token] = float(max / temperature + log_sum);
  running.statistics.finish(head, i, s, t, max - max, token, out.statistics);
}

}  // namespace EK_ISA
