// Gradients of linear_logprob_entropy from the R rows that carry gradient, in one pass over V.
//
//   dz_j = [g_logprob (1[j = target] - p_j) + g_logsumexp p_j - g_entropy p_j (log p_j + H)] / temp
//
// For a block of the weight's rows the logits are recomputed tile by tile, turned into dz, and used
// twice while they are in the cache: the block's rows of dW are written, or added to, once; dH is
// added up in fp32 for each thread. dz is held in the dtype of the inputs where the products take
// it (bf16).
#pragma once

#include "active_rows.h"

namespace EK_ISA {

using entropy_kernels::Gradients;

// Rows of the weight a block: its dz, 4 bytes a value in any dtype, stays in the L2 cache; 384 are
// the most that was measured, and a thread takes no more than its share of the vocabulary.
static std::int64_t block_rows(const Head& head, int threads) {
  const std::int64_t fitting = head.caches.l2 * 4 / 5 / (kRowStride * 4);
  const std::int64_t share = round_up(head.vocabulary, threads) / threads;
  return std::min(std::clamp<std::int64_t>(fitting / kTileRows * kTileRows, kTileRows, 384),
                  round_up(share, kTileRows));
}

// Logits become dz. At the target g_logprob (1 - p) comes from expm1, which keeps its digits.
static void differentiate_tile(const ActivePanel& panel, std::int64_t first_row, std::int64_t rows,
                               bool with_entropy, float* tile) {
  const Vec zero{}, low = splat(kLowestExponent);
  float at_target[kPanel];
  for (int i = 0; i < kPanel; ++i) {
    const std::int64_t r = panel.target[i] - first_row;
    if (r < 0 || r >= rows) continue;
    const float d = (tile[r * kPanel + i] - panel.max[i]) / panel.temperature[i] - panel.log_sum[i];
    const float logp = d < kLowestExponent ? kLowestExponent : (d > 0 ? 0 : d);
    at_target[i] = std::exp(logp) * (panel.rest[i] - panel.entropy[i] * logp) -
                   panel.logprob[i] * std::expm1(logp);
  }
  for (int j = 0; j < kPanel; j += kLanes) {
    const Vec max = load(panel.max + j), temperature = load(panel.temperature + j);
    const Vec log_sum = load(panel.log_sum + j), entropy = load(panel.entropy + j);
    const Vec factor = load(panel.rest + j) - load(panel.logprob + j);
    for (std::int64_t r = 0; r < rows; ++r) {
      float* z = tile + r * kPanel + j;
      Vec logp = (load(z) - max) / temperature - log_sum;
      logp = larger(low, -larger(zero, -logp));
      Vec p = exp_nonpositive(logp);
      p = logp == low ? zero : p;  // a logit of -inf has p = 0 exactly
      store(z, p * (with_entropy ? factor - entropy * logp : factor));
    }
  }
  for (int i = 0; i < kPanel; ++i) {
    const std::int64_t r = panel.target[i] - first_row;
    if (r >= 0 && r < rows) tile[r * kPanel + i] = at_target[i];
  }
}

// softcap: z becomes the capped logit, slope its derivative 1 - tanh^2.
static void cap_with_slope(float softcap, std::int64_t rows, float* tile, float* slope) {
  for (std::int64_t i = 0; i < rows * kPanel; ++i) {
    const float u = std::tanh(tile[i] / softcap);
    slope[i] = 1 - u * u;
    tile[i] = softcap * u;
  }
}

// dz of one block, in the two layouts that the products read: along the active rows for dW, along
// the weight's rows for dH. With fp32 they are one.
template <class E>
struct Block {
  using Unit = typename E::Unit;
  std::vector<Unit> along_active, along_vocabulary;

  explicit Block(std::int64_t rows) : along_active(rows * kRowStride / E::kWidth) {
    if (E::kWidth == 2) along_vocabulary.resize(rows / 2 * kRowStride);
  }

  // Rows [first, first + rows) of the block, active rows [column, column + 64); an odd last row is
  // followed by zero.
  void put(const float* tile, std::int64_t first, std::int64_t rows, std::int64_t column) {
    if constexpr (E::kWidth == 1) {
      for (std::int64_t r = 0; r < rows; ++r)
        std::memcpy(along_active.data() + (first + r) * kRowStride + column, tile + r * kPanel,
                    kPanel * 4);
    } else {
#ifdef EK_BF16
      for (std::int64_t r = 0; r < rows; r += 2) {
        for (int j = 0; j < kPanel; j += kLanes) {
          const Vec low = load(tile + r * kPanel + j);
          const Vec high = r + 1 < rows ? load(tile + (r + 1) * kPanel + j) : Vec{};
          const HalfVec a = to_bf16(low), b = to_bf16(high);
          auto* active = reinterpret_cast<std::uint16_t*>(along_active.data());
          active += (first + r) * kRowStride + column + j;
          std::memcpy(active, &a, sizeof a);
          if (r + 1 < rows) std::memcpy(active + kRowStride, &b, sizeof b);
          const Pairs pairs = pair_up(a, b);
          std::memcpy(along_vocabulary.data() + (first + r) / 2 * kRowStride + column + j, &pairs,
                      sizeof pairs);
        }
      }
#endif
    }
  }

  Left<E> for_weight() const { return {along_active.data(), kRowStride / E::kWidth, 1}; }
  Left<E> for_hidden() const {
    return {E::kWidth == 1 ? along_active.data() : along_vocabulary.data(), 1, kRowStride};
  }
};

// `count` values of a row of dW, from column `first` on.
static void write_weight(const Gradients& out, std::int64_t dim, std::int64_t row,
                         std::int64_t first, std::int64_t count, const float* values) {
  const Dtype dtype = out.weight_dtype;
  char* to = static_cast<char*>(out.weight) + (row * dim + first) * bytes_of(dtype);
  if (dtype == Dtype::f32) {
    auto* sum = reinterpret_cast<float*>(to);
    if (!out.add_weight)
      std::memcpy(sum, values, count * 4);
    else
      for (std::int64_t i = 0; i < count; ++i) sum[i] += values[i];
    return;
  }
  auto* half = reinterpret_cast<std::uint16_t*>(to);
  if (!out.add_weight) {
    for (std::int64_t i = 0; i < count; ++i)
      half[i] = dtype == Dtype::bf16 ? to_bf16(values[i]) : to_f16(values[i]);
  } else if (dtype == Dtype::bf16) {
    for (std::int64_t i = 0; i < count; ++i) half[i] = to_bf16(from_bf16(half[i]) + values[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) half[i] = to_f16(from_f16(half[i]) + values[i]);
  }
}

// One thread's part of the vocabulary.
template <class E>
class Worker {
  using Unit = typename E::Unit;

 public:
  Worker(const Head& head, const Rows& rows, std::int64_t size, bool with_entropy,
         const Gradients& out, const Gathered<E>& gathered)
      : head_(head), rows_(rows), size_(size), with_entropy_(with_entropy), out_(out),
        gathered_(gathered), wide_(round_up(head.dim, kPanel)), scratch_(size * gathered.units),
        tile_(kTileRows * kPanel), slope_(head.softcap > 0 ? kTileRows * kPanel : 0), dz_(size) {
    if (out.weight != nullptr)
      dweight_.resize(size * (gathered.row_chunks > 1 ? wide_ : std::int64_t{kPanel}));
    if (out.hidden != nullptr) {
      packed_.resize(size / E::kWidth * wide_);
      dhidden_.resize(rows.count * wide_);
    }
  }

  // Rows [first, first + count) of the weight.
  void block(std::int64_t first, std::int64_t count) {
    [[maybe_unused]] const Ready<E> ready{};
    const Left<E> weight = weight_rows<E>(head_, first, count, scratch_.data(), false);
    if (out_.hidden != nullptr)
      pack_columns<E>(weight.data, weight.row_stride, count, head_.dim, packed_.data());
    if (out_.bias != nullptr) std::fill_n(out_.bias + first, count, 0.0f);
    for (std::int64_t c = 0; c < gathered_.row_chunks; ++c) {
      const std::int64_t chunk = c * kRowChunk;
      const std::int64_t here = std::min(kRowChunk, rows_.count - chunk);
      for (std::int64_t r = 0; r < count; r += kTileRows)
        for (std::int64_t p = 0; p < here; p += kPanel)
          tile(weight, first, r, std::min<std::int64_t>(kTileRows, count - r), chunk + p, p);
      if (out_.weight != nullptr) add_weight(c, first, count, here);
      if (out_.hidden != nullptr) add_hidden(chunk, count, here);
    }
  }

  // 64 values of D of one row of dH, from column d on.
  const float* dhidden(std::int64_t row, std::int64_t d) const {
    return dhidden_.data() + d * rows_.count + row * kPanel;
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
      products += rows * std::min<std::int64_t>(kPanel, rows_.count - active) * head_.dim;
    } else {
      read_kept(panel, first + r, rows, std::min<std::int64_t>(kPanel, rows_.count - active), z);
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

  // The kept logits of `count` active rows; where those are a panel of forward's, in one piece.
  void read_kept(const ActivePanel& panel, std::int64_t first, std::int64_t rows,
                 std::int64_t count, float* z) const {
    const float* lanes[kPanel];
    bool whole = count == kPanel && panel.token[0] % kPanel == 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t token = panel.token[i];
      lanes[i] = kept_tile(head_, first, token / kPanel) + token % kPanel;
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

  // Each panel of dW is written while it is in the cache, after the last chunk of active rows.
  void add_weight(std::int64_t c, std::int64_t first, std::int64_t count, std::int64_t here) {
    const std::int64_t units = round_up(here, E::kWidth) / E::kWidth;
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
    const std::int64_t units = round_up(count, E::kWidth) / E::kWidth;
    for (std::int64_t d = 0; d < wide_; d += kPanel)
      product<E>(here, dz_.for_hidden(), packed_.data() + d * units, units,
                 dhidden_.data() + d * rows_.count + chunk * kPanel, kPanel, true);
    products += count * here * head_.dim;
  }

  const Head& head_;
  const Rows& rows_;
  const std::int64_t size_;
  const bool with_entropy_;
  const Gradients& out_;
  const Gathered<E>& gathered_;
  std::int64_t wide_;
  std::vector<Unit> scratch_, packed_;
  std::vector<float> tile_, slope_;
  std::vector<float> dweight_,
      dhidden_;  // panels of D: [rows][64], no stride a cache maps to few sets
  Block<E> dz_;
};

template <class E>
static std::int64_t backward(const Head& head, const Rows& rows, const Statistics& found,
                             const Incoming& in, const Gradients& out, Stop stop) {
  if (rows.count == 0) {
    if (out.weight != nullptr && !out.add_weight)
      std::memset(out.weight, 0, head.vocabulary * head.dim * bytes_of(out.weight_dtype));
    if (out.bias != nullptr) std::fill_n(out.bias, head.vocabulary, 0.0f);
    return 0;
  }
  const int threads = usable_threads(head.threads);
  const std::int64_t size = block_rows(head, threads);
  const std::int64_t blocks = round_up(head.vocabulary, size) / size;
  if (out.weight != nullptr && !out.add_weight)
    entropy_kernels::prefer_huge_pages(out.weight,
                                       head.vocabulary * head.dim * bytes_of(out.weight_dtype));
  const Gathered<E> gathered(head, rows, found, in, out.weight != nullptr);
  std::vector<Worker<E>> workers;
  workers.reserve(threads);
  for (int i = 0; i < threads; ++i)
    workers.emplace_back(head, rows, size, in.entropy != nullptr, out, gathered);
  Interrupt interrupted(stop);
#pragma omp parallel num_threads(threads)
  {
    const int thread = thread_number();
    const Part mine(blocks, threads, thread);
    for (std::int64_t b = mine.begin; b < mine.end && !interrupted(); ++b)
      workers[thread].block(b * size, std::min(size, head.vocabulary - b * size));
#pragma omp barrier
    const Part some(rows.count, threads, thread);
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
