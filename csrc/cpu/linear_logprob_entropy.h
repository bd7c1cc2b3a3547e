// Log-probability and entropy of every row in one walk over the vocabulary.
//
// Tokens lie in the vector lanes. Hidden states are packed once into panels of 64; rows of the
// weight are broadcast from where they are. A tile of 96 x 64 logits is reduced along the
// vocabulary, by running_sums.h, without leaving the L1 cache.
#pragma once

#include <numeric>

#include "pages.h"
#include "running_sums.h"
#include "threads.h"

namespace EK_ISA {

using entropy_kernels::Stop;

// The fewest panels of tokens for which a copy of the weight's rows saves more time than it costs.
constexpr std::int64_t kPanelsWorthACopy = 4;

// How many tokens are packed at once. Each tile of the weight reads them all, so they may fill a
// quarter of the last cache, which other programs use too. Below 256 the weight is read too often.
template <class E>
static std::int64_t token_chunk(const Head& head) {
  const std::int64_t fitting = head.caches.last / 4 / (head.dim * 4 / E::kWidth);
  return std::clamp<std::int64_t>(fitting / kPanel * kPanel, 256, 2048);
}

// A packed chunk of tokens, and each thread's sums of them.
template <class E, class S>
class Walk {
  using Unit = typename E::Unit;

 public:
  Walk(const ForwardCall& call, int threads)
      : call_(call), head_(call.head), threads_(threads), units_(units_of<E>(head_.dim)),
        chunk_(token_chunk<E>(head_)),
        capacity_(std::min(round_up(call.rows.count, kPanel), chunk_) / kPanel),
        tiles_(ceil_div(head_.vocabulary, kTileRows)), packed_(capacity_ * units_ * kPanel),
        buffer_(threads * kPanel * units_), scratch_(threads * kTileRows * units_),
        running_(threads * capacity_), products_(threads) {}

  void chunk(std::int64_t first, Interrupt& interrupted) {
    first_ = first;
    count_ = std::min(chunk_, call_.rows.count - first);
    const std::int64_t panels = ceil_div(count_, kPanel);
    // A short vocabulary is not divided among the threads; the tokens are.
    const bool by_tokens = tiles_ < 8 * threads_ && panels >= threads_;
#pragma omp parallel num_threads(threads_)
    {
      const int thread = thread_number();
      const Part mine(panels, threads_, thread);
      for (std::int64_t p = mine.begin; p < mine.end; ++p) pack(thread, p);
      for (std::int64_t p = 0; p < panels; ++p)
        running(thread, p).start(head_, call_.rows, first + p * kPanel);
#pragma omp barrier
      const Part tiles = by_tokens ? Part(tiles_, 1, 0) : Part(tiles_, threads_, thread);
      const Part all = by_tokens ? mine : Part(panels, 1, 0);
      for (std::int64_t v = tiles.begin; v < tiles.end && !interrupted(); ++v)
        walk_tile(thread, v * kTileRows, all);
#pragma omp barrier
      for (std::int64_t p = mine.begin; p < mine.end; ++p) merge(p);
    }
  }

  std::int64_t products() const {
    return std::accumulate(products_.begin(), products_.end(), std::int64_t{0});
  }

 private:
  Running<S>& running(int thread, std::int64_t p) { return running_[thread * capacity_ + p]; }

  std::int64_t tokens_of(std::int64_t p, std::int64_t* token) const {
    const std::int64_t here = std::min<std::int64_t>(kPanel, count_ - p * kPanel);
    for (std::int64_t i = 0; i < here; ++i) token[i] = call_.rows[first_ + p * kPanel + i];
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
        std::memcpy(stored_tile(head_, first, first_ / kPanel + p), tile,
                    height * kPanel * sizeof(float));
      if (head_.softcap > 0) cap_tile(head_.softcap, height, tile);
      products_[thread] += height * here * head_.dim;
      take_targets(head_.target, token, here, first, height, tile, running(thread, p));
      if (head_.temperature != nullptr)
        reduce_tile<true>(tile, first, height, running(thread, p));
      else
        reduce_tile<false>(tile, first, height, running(thread, p));
    }
  }

  void merge(std::int64_t p) {
    std::int64_t token[kPanel];
    const std::int64_t here = tokens_of(p, token);
    for (int i = 0; i < here; ++i) {
      for (int thread = 1; thread < threads_; ++thread) running(0, p).merge(running(thread, p), i);
      finish(call_, running(0, p), i, token[i]);
    }
  }

  const ForwardCall& call_;
  const Head& head_;
  const int threads_;
  const std::int64_t units_, chunk_, capacity_, tiles_;
  std::int64_t first_ = 0, count_ = 0;
  std::vector<Unit> packed_, buffer_, scratch_;
  std::vector<Running<S>> running_;
  std::vector<std::int64_t> products_;
};

template <class E, class S>
static std::int64_t forward(const ForwardCall& call, Stop stop) {
  const Head& head = call.head;
  const std::int64_t count = call.rows.count;
  if (count == 0) return 0;
  if (head.logits != nullptr)
    entropy_kernels::prefer_huge_pages(
        head.logits, round_up(head.tokens, kPanel) * head.vocabulary * sizeof(float));
  Interrupt interrupted(stop);
  Walk<E, S> walk(call, usable_threads(head.threads));
  for (std::int64_t first = 0; first < count && !interrupted(); first += token_chunk<E>(head))
    walk.chunk(first, interrupted);
  return interrupted() ? -1 : walk.products();
}

}  // namespace EK_ISA
