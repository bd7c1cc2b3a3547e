// The two products behind a head over sets of ids: dot products of pairs of rows, and sums of
// scaled rows. Rows are read where they are, in any order; products and sums are fp32.
#pragma once

#include <algorithm>
#include <vector>

#include "threads.h"
#include "values.h"

namespace EK_ISA {

using entropy_kernels::PairDots;
using entropy_kernels::PairSums;
using entropy_kernels::Stop;

constexpr int kDotSums = 4;                 // vectors of sums in a dot product
constexpr std::int64_t kAhead = 8;          // pairs that rows are asked for ahead
constexpr int kTogether = 4;                // rows that are added while a sum is in a register
constexpr std::int64_t kPiece = 512;        // pairs of a run that are summed by themselves
constexpr std::int64_t kPairsPerStop = 64;  // pairs between questions whether to stop
// Multiplications that are worth a thread.
constexpr std::int64_t kWorthAThread = 1 << 16;

static inline int threads_of(std::int64_t pairs, std::int64_t dim, int threads) {
  const std::int64_t worth = pairs * std::max<std::int64_t>(dim, 1) / kWorthAThread;
  return int(std::clamp<std::int64_t>(worth, 1, usable_threads(threads)));
}

// Asks for a row that is read soon. The processor cannot guess which one comes next.
static inline void ask_for(const char* row, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

static inline float sum_of_lanes(Vec v) {
  float lanes[kLanes], sum = 0;
  store(lanes, v);
  for (const float lane : lanes) sum += lane;
  return sum;
}

template <Dtype kDtype>
static float dot(const char* a, const char* b, std::int64_t dim) {
  constexpr std::int64_t kBytes = kLanes * bytes_of(kDtype);
  Vec sums[kDotSums] = {};
  std::int64_t left = dim;
  for (; left >= kDotSums * kLanes; left -= kDotSums * kLanes)
#pragma GCC unroll 8
    for (int k = 0; k < kDotSums; ++k, a += kBytes, b += kBytes)
      sums[k] += widened<kDtype>(a) * widened<kDtype>(b);
  for (; left >= kLanes; left -= kLanes, a += kBytes, b += kBytes)
    sums[0] += widened<kDtype>(a) * widened<kDtype>(b);
  if (left > 0) sums[1] += widened_tail<kDtype>(a, left) * widened_tail<kDtype>(b, left);
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <Dtype kDtype>
static void dots(const PairDots& call, Part pairs, Interrupt& interrupted) {
  const std::int64_t bytes = call.dim * bytes_of(kDtype);
  for (std::int64_t n = pairs.begin; n < pairs.end; ++n) {
    if (n % kPairsPerStop == 0 && interrupted()) return;
    if (n + kAhead < pairs.end) {
      ask_for(row_of(call.right, call.right_row[n + kAhead]), bytes);
      if (call.left_row[n + kAhead] != call.left_row[n + kAhead - 1])
        ask_for(row_of(call.left, call.left_row[n + kAhead]), bytes);
    }
    call.out[n] = dot<kDtype>(row_of(call.left, call.left_row[n]),
                              row_of(call.right, call.right_row[n]), call.dim);
  }
}

// Each product has its own sum, so its bits do not depend on the threads.
static std::int64_t pair_dots(const PairDots& call, Stop stop) {
  Interrupt interrupted(stop);
  const int threads = threads_of(call.pairs, call.dim, call.threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t)
    with_dtype(call.left.dtype, [&](auto dtype) {
      dots<dtype.value>(call, Part(call.pairs, threads, t), interrupted);
    });
  return interrupted() ? -1 : call.pairs * call.dim;
}

// sums += scale[0] rows[0] + ... + scale[kCount - 1] rows[kCount - 1], one after the other.
template <Dtype kDtype, int kCount>
static void add_rows(const char* const* rows, const float* scale, std::int64_t dim, float* sums) {
  constexpr std::int64_t kSize = bytes_of(kDtype);
  Vec factor[kCount];
#pragma GCC unroll 8
  for (int k = 0; k < kCount; ++k) factor[k] = splat(scale[k]);
  std::int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    Vec sum = load(sums + i);
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) sum += factor[k] * widened<kDtype>(rows[k] + i * kSize);
    store(sums + i, sum);
  }
  if (i == dim) return;
  Vec sum = load(sums + i);
  for (int k = 0; k < kCount; ++k)
    sum += factor[k] * widened_tail<kDtype>(rows[k] + i * kSize, dim - i);
  store(sums + i, sum);
}

// The sums of pieces of long runs, in order.
struct Partials {
  std::vector<std::int64_t> place;
  std::vector<float> sums;  // [pieces, dim]
};

// One thread's pieces. A piece is a run, or kPiece pairs of a longer one from its beginning on, or
// such a run's rest. Where pieces begin depends on the places alone, so the sums have the same bits
// at any number of threads.
template <Dtype kDtype>
class PieceSums {
 public:
  explicit PieceSums(const PairSums& call)
      : call_(call), sums_((call.dim + kLanes - 1) / kLanes * kLanes) {}

  // Sums the pieces that begin in `pairs`, and writes those that are a whole run.
  void walk(Part pairs, Interrupt& interrupted) {
    const std::int64_t last = piece_from(pairs.end);
    for (std::int64_t n = piece_from(pairs.begin), end; n < last && !interrupted(); n = end) {
      end = end_of(n);
      if (!add(n, end)) continue;
      if ((n == 0 || !same(n - 1, n)) && (end == call_.pairs || !same(n, end)))
        write(call_, call_.place[n], sums_.data());
      else
        keep(call_.place[n]);
    }
  }

  static void write(const PairSums& call, std::int64_t place, const float* sums) {
    char* row = static_cast<char*>(call.out) + place * call.out_stride * bytes_of(call.out_dtype);
    write_values(row, call.out_dtype, call.add, call.dim, sums);
  }

  const Partials& partials() const { return partials_; }
  std::int64_t products() const { return products_; }

 private:
  bool same(std::int64_t n, std::int64_t m) const { return call_.place[n] == call_.place[m]; }

  // The first pair from `n` on that begins a piece.
  std::int64_t piece_from(std::int64_t n) const {
    if (n == call_.pairs) return n;
    const std::int64_t run =
        std::lower_bound(call_.place, call_.place + n, call_.place[n]) - call_.place;
    const std::int64_t next = run + (n - run + kPiece - 1) / kPiece * kPiece;
    std::int64_t m = n;
    while (m < next && m < call_.pairs && same(n, m)) ++m;
    return m;
  }

  // Where the piece that begins at `n` ends.
  std::int64_t end_of(std::int64_t n) const {
    const std::int64_t last = std::min(n + kPiece, call_.pairs);
    std::int64_t m = n + 1;
    while (m < last && same(n, m)) ++m;
    return m;
  }

  // Sums pairs [begin, end). Returns whether any has a scale that is not 0.
  bool add(std::int64_t begin, std::int64_t end) {
    const char* rows[kTogether];
    float scale[kTogether];
    int count = 0;
    std::int64_t all = 0;
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (std::int64_t n = begin; n < end; ++n) {
      const std::int64_t ahead = n + kAhead;
      if (ahead < call_.pairs && call_.scale[ahead] != 0)
        ask_for(row_of(call_.rows, call_.row[ahead]), call_.dim * bytes_of(kDtype));
      if (call_.scale[n] == 0) continue;
      rows[count] = row_of(call_.rows, call_.row[n]);
      scale[count++] = call_.scale[n];
      ++all;
      if (count < kTogether) continue;
      add_rows<kDtype, kTogether>(rows, scale, call_.dim, sums_.data());
      count = 0;
    }
    for (int k = 0; k < count; ++k)
      add_rows<kDtype, 1>(rows + k, scale + k, call_.dim, sums_.data());
    products_ += all * call_.dim;
    return all > 0;
  }

  void keep(std::int64_t place) {
    partials_.place.push_back(place);
    partials_.sums.resize(partials_.sums.size() + call_.dim);
    std::copy_n(sums_.data(), call_.dim, partials_.sums.data() + partials_.sums.size() - call_.dim);
  }

  const PairSums& call_;
  std::vector<float> sums_;
  Partials partials_;
  std::int64_t products_ = 0;
};

// Adds up the pieces of each long run, in order, and writes the run's sum.
template <Dtype kDtype>
static void merge_pieces(const PairSums& call, const std::vector<PieceSums<kDtype>>& threads) {
  std::vector<float> sums(call.dim);
  std::int64_t place = -1;
  for (const PieceSums<kDtype>& thread : threads)
    for (std::size_t piece = 0; piece < thread.partials().place.size(); ++piece) {
      const float* part = thread.partials().sums.data() + piece * call.dim;
      if (thread.partials().place[piece] == place) {
        for (std::int64_t i = 0; i < call.dim; ++i) sums[i] += part[i];
        continue;
      }
      if (place >= 0) PieceSums<kDtype>::write(call, place, sums.data());
      place = thread.partials().place[piece];
      std::copy_n(part, call.dim, sums.data());
    }
  if (place >= 0) PieceSums<kDtype>::write(call, place, sums.data());
}

template <Dtype kDtype>
static std::int64_t sums(const PairSums& call, Stop stop) {
  Interrupt interrupted(stop);
  const int threads = threads_of(call.pairs, call.dim, call.threads);
  std::vector<PieceSums<kDtype>> pieces(threads, PieceSums<kDtype>(call));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) pieces[t].walk(Part(call.pairs, threads, t), interrupted);
  if (interrupted()) return -1;
  merge_pieces<kDtype>(call, pieces);
  std::int64_t products = 0;
  for (const PieceSums<kDtype>& thread : pieces) products += thread.products();
  return products;
}

static std::int64_t pair_sums(const PairSums& call, Stop stop) {
  if (call.dim == 0) return 0;
  return with_dtype(call.rows.dtype, [&](auto dtype) { return sums<dtype.value>(call, stop); });
}

}  // namespace EK_ISA
