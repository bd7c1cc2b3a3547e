// Gradients of linear_logprob_entropy from the R rows that carry gradient, in one pass over V.
//
// For a block of the weight's rows the logits are recomputed tile by tile (or read, if forward
// stored them), turned into dz by logit_gradients.h, and used twice while they are in the cache.
// The block's rows of dW are written, or added to, once; each thread sums its part of dH in fp32.
#pragma once

#include "logit_gradients.h"
#include "pages.h"
#include "threads.h"

namespace EK_ISA {

using entropy_kernels::Gradients;
using entropy_kernels::Stop;

// How many rows of the weight make a block. Its dz, 4 bytes per value in any dtype, stays in the L2
// cache. 384 rows are the most that was measured; a thread's share of the vocabulary may be less.
static std::int64_t block_rows(const Head& head, int threads) {
  const std::int64_t fitting = head.caches.l2 * 4 / 5 / (kRowStride * 4);
  const std::int64_t share = ceil_div(head.vocabulary, threads);
  return std::min(std::clamp<std::int64_t>(fitting / kTileRows * kTileRows, kTileRows, 384),
                  round_up(share, kTileRows));
}

// Writes, or adds, `count` values to a row of dW from column `first` on.
static void write_weight(const Gradients& out, std::int64_t dim, std::int64_t row,
                         std::int64_t first, std::int64_t count, const float* values) {
  const Dtype dtype = out.weight_dtype;
  char* to = static_cast<char*>(out.weight) + (row * dim + first) * bytes_of(dtype);
  write_values(to, dtype, out.add_weight, count, values);
}

// One thread's part of the vocabulary, block by block.
template <class E>
class Worker {
  using Unit = typename E::Unit;

 public:
  Worker(const BackwardCall& call, std::int64_t size, const Gathered<E>& gathered)
      : head_(call.head), out_(call.out), rows_(call.rows.count), size_(size),
        with_entropy_(call.in.entropy != nullptr), gathered_(gathered),
        wide_(round_up(head_.dim, kPanel)), scratch_(size * gathered.units),
        tile_(kTileRows * kPanel), slope_(head_.softcap > 0 ? kTileRows * kPanel : 0), dz_(size) {
    if (out_.weight != nullptr)
      dweight_.resize(size * (gathered.row_chunks > 1 ? wide_ : std::int64_t{kPanel}));
    if (out_.hidden != nullptr) {
      packed_.resize(size / E::kWidth * wide_);
      dhidden_.resize(rows_ * wide_);
    }
  }

  // Works on rows [first, first + count) of the weight.
  void block(std::int64_t first, std::int64_t count) {
    [[maybe_unused]] const Ready<E> ready{};
    const Left<E> weight = weight_rows<E>(head_, first, count, scratch_.data(), false);
    if (out_.hidden != nullptr)
      pack_columns<E>(weight.data, weight.row_stride, count, head_.dim, packed_.data());
    if (out_.bias != nullptr) std::fill_n(out_.bias + first, count, 0.0f);
    for (std::int64_t c = 0; c < gathered_.row_chunks; ++c) {
      const std::int64_t chunk = c * kRowChunk;
      const std::int64_t here = std::min(kRowChunk, rows_ - chunk);
      for (std::int64_t r = 0; r < count; r += kTileRows)
        for (std::int64_t p = 0; p < here; p += kPanel)
          tile(weight, first, r, std::min<std::int64_t>(kTileRows, count - r), chunk + p, p);
      if (out_.weight != nullptr) add_weight(c, first, count, here);
      if (out_.hidden != nullptr) add_hidden(chunk, count, here);
    }
  }

  // 64 values of one row of this thread's dH, from column d on.
  const float* dhidden(std::int64_t row, std::int64_t d) const {
    return dhidden_.data() + d * rows_ + row * kPanel;
  }

  std::int64_t products = 0;

 private:
  void tile(Left<E> weight, std::int64_t first, std::int64_t r, std::int64_t rows,
            std::int64_t active, std::int64_t column) {
    const ActivePanel& panel = gathered_.active[active / kPanel];
    float* z = tile_.data();
    if (head_.logits == nullptr) {
      const Left<E> part{weight.data + r * weight.row_stride, weight.row_stride, 1};
      logits_tile<E>(head_, part, first + r, rows,
                     gathered_.along_dim.data() + active * gathered_.units, z);
      products += rows * std::min<std::int64_t>(kPanel, rows_ - active) * head_.dim;
    } else {
      read_stored(panel, first + r, rows, std::min<std::int64_t>(kPanel, rows_ - active), z);
    }
    if (head_.softcap > 0) cap_with_slope(head_.softcap, rows, z, slope_.data());
    differentiate_tile(panel, first + r, rows, with_entropy_, z);
    if (head_.softcap > 0)
      for (std::int64_t i = 0; i < rows * kPanel; ++i) z[i] *= slope_[i];
    if (out_.bias != nullptr)
      for (std::int64_t k = 0; k < rows; ++k) {
        double sum = 0;
        for (int i = 0; i < kPanel; ++i) sum += z[k * kPanel + i];
        out_.bias[first + r + k] += float(sum);
      }
    dz_.put(z, r, rows, column);
  }

  // Reads the stored logits of `count` active rows, in one piece if those are a panel of forward's.
  void read_stored(const ActivePanel& panel, std::int64_t first, std::int64_t rows,
                   std::int64_t count, float* z) const {
    const float* lanes[kPanel];
    bool whole = count == kPanel && panel.token[0] % kPanel == 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t token = panel.token[i];
      lanes[i] = stored_tile(head_, first, token / kPanel) + token % kPanel;
      whole = whole && lanes[i] == lanes[0] + i;
    }
    if (whole) {
      std::memcpy(z, lanes[0], rows * kPanel * sizeof(float));
      return;
    }
    std::fill_n(z, rows * kPanel, 0.0f);
    for (std::int64_t k = 0; k < rows; ++k)
      for (std::int64_t i = 0; i < count; ++i) z[k * kPanel + i] = lanes[i][k * kPanel];
  }

  // Writes each panel of dW after the last chunk of active rows, while the panel is in the cache.
  void add_weight(std::int64_t c, std::int64_t first, std::int64_t count, std::int64_t here) {
    const std::int64_t units = units_of<E>(here);
    const Unit* right = gathered_.along_rows.data() + c * (kRowChunk / E::kWidth) * wide_;
    for (std::int64_t d = 0; d < wide_; d += kPanel) {
      float* panel = dweight_.data() + (gathered_.row_chunks > 1 ? d * size_ : 0);
      product<E>(count, dz_.for_weight(), right + d * units, units, panel, kPanel, c > 0);
      if (c + 1 < gathered_.row_chunks) continue;
      for (std::int64_t r = 0; r < count; ++r)
        write_weight(out_, head_.dim, first + r, d, std::min<std::int64_t>(kPanel, head_.dim - d),
                     panel + r * kPanel);
    }
    products += count * here * head_.dim;
  }

  void add_hidden(std::int64_t chunk, std::int64_t count, std::int64_t here) {
    const std::int64_t units = units_of<E>(count);
    for (std::int64_t d = 0; d < wide_; d += kPanel)
      product<E>(here, dz_.for_hidden(), packed_.data() + d * units, units,
                 dhidden_.data() + d * rows_ + chunk * kPanel, kPanel, true);
    products += count * here * head_.dim;
  }

  const Head& head_;
  const Gradients& out_;
  const std::int64_t rows_, size_;
  const bool with_entropy_;
  const Gathered<E>& gathered_;
  std::int64_t wide_;
  std::vector<Unit> scratch_, packed_;
  std::vector<float> tile_, slope_;
  // Panels of D, [rows][64]: no stride that a cache maps to few sets.
  std::vector<float> dweight_, dhidden_;
  Block<E> dz_;
};

template <class E>
static std::int64_t backward(const BackwardCall& call, Stop stop) {
  const Head& head = call.head;
  const Gradients& out = call.out;
  const std::int64_t rows = call.rows.count;
  const bool overwrites = out.weight != nullptr && !out.add_weight;
  const std::int64_t weight_bytes = head.vocabulary * head.dim * bytes_of(out.weight_dtype);
  if (rows == 0) {
    if (overwrites) std::memset(out.weight, 0, weight_bytes);
    if (out.bias != nullptr) std::fill_n(out.bias, head.vocabulary, 0.0f);
    return 0;
  }
  const int threads = usable_threads(head.threads);
  const std::int64_t size = block_rows(head, threads);
  const std::int64_t blocks = ceil_div(head.vocabulary, size);
  if (overwrites) entropy_kernels::prefer_huge_pages(out.weight, weight_bytes);
  const Gathered<E> gathered(call);
  std::vector<Worker<E>> workers;
  workers.reserve(threads);
  for (int i = 0; i < threads; ++i) workers.emplace_back(call, size, gathered);
  Interrupt interrupted(stop);
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_number();
    const Part mine(blocks, threads, thread);
    for (std::int64_t b = mine.begin; b < mine.end && !interrupted(); ++b)
      workers[thread].block(b * size, std::min(size, head.vocabulary - b * size));
#pragma omp barrier
    const Part some(rows, threads, thread);
    if (out.hidden != nullptr)
      for (std::int64_t d = 0; d < head.dim; d += kPanel)
        for (std::int64_t r = some.begin; r < some.end; ++r) {
          float sum[kPanel] = {};
          for (const Worker<E>& worker : workers) {
            const float* part = worker.dhidden(r, d);
            for (int i = 0; i < kPanel; ++i) sum[i] += part[i];
          }
          std::memcpy(out.hidden + r * head.dim + d, sum,
                      std::min<std::int64_t>(kPanel, head.dim - d) * sizeof(float));
        }
  }
  if (interrupted()) return -1;
  std::int64_t products = 0;
  for (const Worker<E>& worker : workers) products += worker.products;
  return products;
}

}  // namespace EK_ISA
