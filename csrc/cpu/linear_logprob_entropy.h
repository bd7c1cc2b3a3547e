// Log-probability and entropy of every row in one walk over the vocabulary.
//
// Tokens lie in the vector lanes: hidden states are packed once into panels of 64, rows of the
// weight are broadcast from where they are, and a tile of 96 x 64 logits is reduced along the
// vocabulary without leaving the L1 cache. Relative to the running maximum m of a token, and with
// one logit that equals it left out,
//   s = sum_j exp(d_j),  t = sum_j d_j exp(d_j),  d_j = (z_j - m) / temperature
// so that H = log1p(s) - t / (1 + s) keeps its digits for entropies of 1e-12. Sums of a tile are
// fp32, sums of tiles fp64.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>

#include "blocks.h"
#include "pages.h"
#include "rows.h"
#include "statistics.h"

namespace EK_ISA {

using entropy_kernels::Statistics;
using entropy_kernels::Stop;

constexpr std::int64_t kPanelsWorthACopy = 4;  // of the weight's rows: it costs less than it saves
constexpr float kLowest = -1e30f;              // the maximum's start; finite, so -inf - m is no NaN
constexpr float kLowestExponent = -87.0f;      // exp of less is subnormal

// A panel of 64 tokens as far as the vocabulary has been walked. `present` counts the maximum: 0
// before the first logit, then 1. s leaves that one out; others that tie with it stay in. M is
// Moments or NoMoments.
template <class M>
struct Running {
  float max[kPanel], present[kPanel], target[kPanel], temperature[kPanel];
  double s[kPanel], t[kPanel];
  M moments;

  void start(const Head& head, const Rows& rows, std::int64_t first) {
    for (int i = 0; i < kPanel; ++i) {
      const bool scaled = head.temperature != nullptr && first + i < rows.count;
      max[i] = kLowest;
      temperature[i] = scaled ? head.temperature[rows[first + i]] : 1.0f;
      present[i] = target[i] = 0.0f;
      s[i] = t[i] = 0.0;
      moments.start(i);
    }
  }

  // The sums relative to a larger maximum, which is not in them: t <- a (t + (1 + s) shift).
  void move(int i, float to) {
    const double shift = (double(max[i]) - double(to)) / temperature[i];
    const double a = std::exp(shift), sum = s[i] + present[i];
    moments.move(i, shift, a, t[i], sum, present[i]);
    t[i] = a * t[i] + (a == 0 ? 0 : a * sum * shift);
    s[i] = a * sum;
    present[i] = 1.0f;
    max[i] = to;
  }

  void merge(Running other, int i) {
    if (other.present[i] == 0) {
      s[i] += other.s[i];  // a NaN
    } else if (present[i] == 0 || other.max[i] > max[i]) {
      move(i, other.max[i]);
      s[i] += other.s[i];
      t[i] += other.t[i];
      moments.add(other.moments, i);
    } else {
      other.move(i, max[i]);
      s[i] += other.s[i];
      t[i] += other.t[i];
      moments.add(other.moments, i);
    }
    target[i] += other.target[i];
  }
};

static void cap_tile(float softcap, std::int64_t rows, float* tile) {
  for (std::int64_t i = 0; i < rows * kPanel; ++i) tile[i] = softcap * std::tanh(tile[i] / softcap);
}

// Where a tile holds a new maximum, the sums move to it and that logit becomes -inf: it drops out.
// The vectors of a panel side by side, since each comparison waits for the one of the row before.
template <class M>
static void take_maxima(float* tile, std::int64_t rows, Running<M>& running) {
  float highest[kPanel];
  for (int j = 0; j < kPanel; j += kVectors * kLanes) {
    Vec top[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) top[v] = load(running.max + j + v * kLanes);
    for (std::int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        top[v] = larger(load(tile + r * kPanel + j + v * kLanes), top[v]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(highest + j + v * kLanes, top[v]);
  }
  if (std::memcmp(highest, running.max, sizeof highest) == 0) return;
  for (int i = 0; i < kPanel; ++i) {
    if (!(highest[i] > running.max[i])) continue;
    std::int64_t r = 0;
    while (tile[r * kPanel + i] != highest[i]) ++r;
    tile[r * kPanel + i] = -std::numeric_limits<float>::infinity();
    running.move(i, highest[i]);
  }
}

// Adds a tile of logits to the sums; overwrites some of it.
template <bool kScaled, class M>
static void reduce_tile(float* tile, std::int64_t rows, Running<M>& running) {
  take_maxima(tile, rows, running);
  for (int j = 0; j < kPanel; j += kLanes) {
    const Vec max = load(running.max + j), temperature = load(running.temperature + j);
    const Vec low = splat(kLowestExponent);
    Vec s{}, t{};
    typename M::Tile moments;
    for (std::int64_t r = 0; r < rows; ++r) {
      Vec d = load(tile + r * kPanel + j) - max;
      if (kScaled) d = d / temperature;
      d = larger(low, d);
      const Vec e = exp_nonpositive(d);
      s += e;
      t += e * d;
      moments.add(e, d);
    }
    running.moments.add(moments, j);
    float s_out[kLanes], t_out[kLanes];
    store(s_out, s), store(t_out, t);
    for (int i = 0; i < kLanes; ++i) {
      running.s[j + i] += s_out[i];
      running.t[j + i] += t_out[i];
    }
  }
}

template <class M>
static void take_targets(const std::int64_t* target, const std::int64_t* token, std::int64_t count,
                         std::int64_t first, std::int64_t height, const float* tile,
                         Running<M>& running) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = target[token[i]] - first;
    if (row >= 0 && row < height) running.target[i] = tile[row * kPanel + i];
  }
}

template <class M>
static void finish(const Head& head, const Running<M>& running, int i, std::int64_t token,
                   const Statistics& out) {
  const double temperature = head.temperature == nullptr ? 1.0 : head.temperature[token];
  // The left-out maximum and logits of -inf added exp(-87) each.
  const bool vanishing = running.s[i] <= 1.7e-38 * double(head.vocabulary);
  const double s = vanishing ? 0.0 : running.s[i], t = vanishing ? 0.0 : running.t[i];
  const double log_sum = std::log1p(s);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  // A row of -inf throughout has no distribution, nor has one with inf.
  const double highest = running.max[i], infinity = std::numeric_limits<double>::infinity();
  const double max = highest > kLowest && highest < infinity && s == s ? highest : nan;
  out.max[token] = float(max);
  out.log_sum[token] = float(max - max + log_sum);
  out.logprob[token] = float((running.target[i] - max) / temperature - log_sum);
  out.entropy[token] = float(max - max + log_sum - t / (1.0 + s));
  out.logsumexp[token] = float(max / temperature + log_sum);
  running.moments.finish(i, s, t, max - max, token, head.tokens, out.moments);
}

// Tokens that are packed at once. Each tile of the weight reads them all, so they have a quarter of
// the last cache, which other programs use too; below 256 the weight would be read too often.
template <class E>
static std::int64_t token_chunk(const Head& head) {
  const std::int64_t fitting = head.caches.last / 4 / (head.dim * 4 / E::kWidth);
  return std::clamp<std::int64_t>(fitting / kPanel * kPanel, 256, 2048);
}

// A chunk of tokens, packed, and what each thread has seen of them.
template <class E, class M>
class Walk {
  using Unit = typename E::Unit;

 public:
  Walk(const Head& head, const Rows& rows, int threads)
      : head_(head), rows_(rows), threads_(threads),
        units_(round_up(head.dim, E::kWidth) / E::kWidth), chunk_(token_chunk<E>(head)),
        capacity_(std::min(round_up(rows.count, kPanel), chunk_) / kPanel),
        tiles_(round_up(head.vocabulary, kTileRows) / kTileRows),
        packed_(capacity_ * units_ * kPanel), buffer_(threads * kPanel * units_),
        scratch_(threads * kTileRows * units_), running_(threads * capacity_), products_(threads) {}

  void chunk(std::int64_t first, const Statistics& out, Interrupt& interrupted) {
    first_ = first;
    count_ = std::min(chunk_, rows_.count - first);
    const std::int64_t panels = round_up(count_, kPanel) / kPanel;
    // A short vocabulary is not divided: each thread takes tokens.
    const bool by_tokens = tiles_ < 8 * threads_ && panels >= threads_;
#pragma omp parallel num_threads(threads_)
    {
      const int thread = thread_number();
      const Part mine(panels, threads_, thread);
      for (std::int64_t p = mine.begin; p < mine.end; ++p) pack(thread, p);
      for (std::int64_t p = 0; p < panels; ++p)
        running(thread, p).start(head_, rows_, first + p * kPanel);
#pragma omp barrier
      const Part tiles = by_tokens ? Part(tiles_, 1, 0) : Part(tiles_, threads_, thread);
      const Part all = by_tokens ? mine : Part(panels, 1, 0);
      for (std::int64_t v = tiles.begin; v < tiles.end && !interrupted(); ++v)
        walk_tile(thread, v * kTileRows, all);
#pragma omp barrier
      for (std::int64_t p = mine.begin; p < mine.end; ++p) merge(p, out);
    }
  }

  std::int64_t products() const {
    return std::accumulate(products_.begin(), products_.end(), std::int64_t{0});
  }

 private:
  Running<M>& running(int thread, std::int64_t p) { return running_[thread * capacity_ + p]; }

  std::int64_t tokens_of(std::int64_t p, std::int64_t* token) const {
    const std::int64_t here = std::min<std::int64_t>(kPanel, count_ - p * kPanel);
    for (std::int64_t i = 0; i < here; ++i) token[i] = rows_[first_ + p * kPanel + i];
    return here;
  }

  void pack(int thread, std::int64_t p) {
    std::int64_t token[kPanel];
    const Unit* lanes[kPanel];
    const std::int64_t here = tokens_of(p, token);
    for (std::int64_t i = 0; i < here; ++i) {
      Unit* row = buffer_.data() + (thread * kPanel + i) * units_;
      read_row<E>(head_.hidden, token[i] * head_.hidden_stride, head_.dim, head_.dtype, row);
      lanes[i] = row;
    }
    pack_rows<E>(lanes, here, units_, packed_.data() + p * units_ * kPanel);
  }

  void walk_tile(int thread, std::int64_t first, Part panels) {
    [[maybe_unused]] const Ready<E> ready{};
    const std::int64_t height = std::min<std::int64_t>(kTileRows, head_.vocabulary - first);
    const Left<E> weight =
        weight_rows<E>(head_, first, height, scratch_.data() + thread * kTileRows * units_,
                       panels.end - panels.begin >= kPanelsWorthACopy);
    alignas(64) float tile[kTileRows * kPanel];
    std::int64_t token[kPanel];
    for (std::int64_t p = panels.begin; p < panels.end; ++p) {
      const std::int64_t here = tokens_of(p, token);
      logits_tile<E>(head_, weight, first, height, packed_.data() + p * units_ * kPanel, tile);
      if (head_.logits != nullptr)
        std::memcpy(kept_tile(head_, first, first_ / kPanel + p), tile,
                    height * kPanel * sizeof(float));
      if (head_.softcap > 0) cap_tile(head_.softcap, height, tile);
      products_[thread] += height * here * head_.dim;
      take_targets(head_.target, token, here, first, height, tile, running(thread, p));
      if (head_.temperature != nullptr)
        reduce_tile<true>(tile, height, running(thread, p));
      else
        reduce_tile<false>(tile, height, running(thread, p));
    }
  }

  void merge(std::int64_t p, const Statistics& out) {
    std::int64_t token[kPanel];
    const std::int64_t here = tokens_of(p, token);
    for (int i = 0; i < here; ++i) {
      for (int thread = 1; thread < threads_; ++thread) running(0, p).merge(running(thread, p), i);
      finish(head_, running(0, p), i, token[i], out);
    }
  }

  const Head& head_;
  const Rows& rows_;
  const int threads_;
  const std::int64_t units_, chunk_, capacity_, tiles_;
  std::int64_t first_ = 0, count_ = 0;
  std::vector<Unit> packed_, buffer_, scratch_;
  std::vector<Running<M>> running_;
  std::vector<std::int64_t> products_;
};

template <class E, class M>
static std::int64_t forward(const Head& head, const Rows& rows, const Statistics& out, Stop stop) {
  if (rows.count == 0) return 0;
  if (head.logits != nullptr)
    entropy_kernels::prefer_huge_pages(
        head.logits, round_up(head.tokens, kPanel) * head.vocabulary * sizeof(float));
  Interrupt interrupted(stop);
  Walk<E, M> walk(head, rows, usable_threads(head.threads));
  for (std::int64_t first = 0; first < rows.count && !interrupted(); first += token_chunk<E>(head))
    walk.chunk(first, out, interrupted);
  return interrupted() ? -1 : walk.products();
}

}  // namespace EK_ISA
