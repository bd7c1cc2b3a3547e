// Whole grids of the forward's epilogue, as the kernels call it: accumulators are the products that
// a main loop would have left there, and NaN where it leaves nothing of use. Every partial, logit
// and untouched place is compared with fp64.
#pragma once
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "forward_tile.h"
#include "tiled_mma.h"

namespace grid {

constexpr float kPoison = 12345.678f;
constexpr int kGuard = 64;
constexpr int kFar = 1 << 26;  // rows of logits before the first, which are not there
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Options {
  char const* name;
  int rows, vocabulary, number;
  bool bias = false, softcap = false, logits = false;
  int stride_temperature = -1;  // no temperatures; 0: one for all
};

inline bool right = true;

inline void expect(bool holds, Options const& options, char const* what, int row, int column,
                   double got, double wanted) {
  if (holds) return;
  std::printf("%s: %s of row %d, %d: got %.9g; wanted %.9g\n", options.name, what, row, column, got,
              wanted);
  right = false;
}

inline void expect_same(Options const& options, char const* what, int row, int column, double got,
                        double wanted) {
  bool const same = got == wanted || (std::isnan(got) && std::isnan(wanted));
  expect(same, options, what, row, column, got, wanted);
}

// Memory between guards, full of poison.
struct Memory {
  std::vector<float> all;
  explicit Memory(size_t size) : all(size + 2 * kGuard, kPoison) {}
  float* data() { return all.data() + kGuard; }
  float operator[](size_t i) const { return all[kGuard + i]; }
  void check(Options const& options, char const* what) const {
    for (int i = 0; i < kGuard; ++i)
      expect(all[i] == kPoison && all[all.size() - 1 - i] == kPoison, options, what, -1, i, all[i],
             kPoison);
  }
};

struct Problem {
  Options options;
  std::vector<float> product, temperature;
  std::vector<uint16_t> bias;
  std::vector<int64_t> target;
  std::vector<int> index;

  explicit Problem(Options const& given) : options(given) {
    int const T = given.rows, V = given.vocabulary;
    std::mt19937 random(T * 31 + V);
    std::normal_distribution<float> normal(0.0f, 6.0f);
    product.resize(size_t(T) * V);
    for (float& x : product) x = normal(random);
    for (int t = 0; t < T; ++t) spoil(t % 16, &product[size_t(t) * V], V);
    // Memory ends with the last of them.
    temperature.reserve(T * std::abs(given.stride_temperature));
    bias.reserve(V);
    for (int t = 0; t < T * std::abs(given.stride_temperature); ++t)
      temperature.push_back(0.6f + 0.002f * t);
    if (given.stride_temperature == 0) temperature.push_back(0.6f);
    for (int v = 0; v < V; ++v) {
      float const x = float(random() % 17) - 8.0f;  // a bf16
      uint32_t bits;
      memcpy(&bits, &x, sizeof bits);
      bias.push_back(uint16_t(bits >> 16));
    }
    int64_t const edges[] = {0, 127, 128, 255, 256, V - 1, V, -100, -1};
    for (int t = 0; t < T; ++t) {
      target.push_back(t < 36 ? edges[t % 9] % (V + 1) : int64_t(random() % V));
      index.push_back(kFar + T - 1 - t);
    }
  }

  static void spoil(int kind, float* z, int V) {
    if (kind == 1)
      for (int v = 0; v < V; v += 3) z[v] = 30.0f;  // ties of the maximum
    if (kind == 2) {                                // nearly certain: an entropy near 1e-9
      for (int v = 0; v < V; ++v) z[v] = -24.0f - 0.01f * v;
      z[V / 2] = 4.0f;
    }
    if (kind == 3)
      for (int v = 0; v + 1 < V; ++v) z[v] = -INFINITY;
    if (kind == 4)
      for (int v = 0; v < V; ++v) z[v] = -INFINITY;
    if (kind == 5) z[V - 1] = kNan;
    if (kind == 6) z[0] = INFINITY;
    if (kind == 7)
      for (int v = 0; v < V; ++v) z[v] = -1e29f;
  }

  ek::Head head() {
    ek::Head head{};
    head.bias = options.bias ? bias.data() : nullptr;
    head.temperature = options.stride_temperature < 0 ? nullptr : temperature.data();
    head.stride_temperature = options.stride_temperature;
    head.softcap = options.softcap ? 25.0f : 0.0f;
    head.rows = options.rows;
    head.depth = 64;
    head.vocabulary = options.vocabulary;
    return head;
  }

  float logit(int t, int v) {
    float z = product[size_t(t) * options.vocabulary + v];
    if (options.bias) z += ek::bf16_at(bias.data(), v);
    return options.softcap ? ek::capped(z, 25.0f) : z;
  }
};

// What a main loop leaves in one thread's registers, and then the operation.
template <class Tile, class Operation>
void run_tile(Operation const& operation, Problem const& problem, int block, int split, int thread,
              float* shared) {
  typename Tile::Shape const tile;
  typename Tile::Mma const mma;
  auto const c = mma.get_thread_slice(thread).partition_C(
      cute::make_identity_tensor(cute::select<0, 1>(tile)));
  auto accumulators = cute::partition_fragment_C(mma, cute::select<0, 1>(tile));
  auto const& options = problem.options;
  for (int e = 0; e < cute::size(accumulators); ++e) {
    int const t = block * cute::size<0>(tile) + cute::get<0>(c(e));
    int const v = split * cute::size<1>(tile) + cute::get<1>(c(e));
    bool const inside = t < options.number && v < options.vocabulary;
    accumulators(e) = inside ? problem.product[size_t(t) * options.vocabulary + v] : kNan;
  }
  if (shared != nullptr) {  // as the main loop: what one thread copies, others read
    shared[thread] = float(thread);
    __syncthreads();
    int const other = (thread + 77) % cute::size(mma);
    expect(shared[other] == float(other), options, "shared memory", block, split, shared[other],
           other);
  }
  operation(tile, block, split, options.number, accumulators, mma, thread, shared);
}

// Blocks of `groups` warpgroups that each take a tile, as pingpong does.
template <class Tile, class Operation>
void run_grid(Operation const& operation, Problem const& problem, int splits, int cluster,
              int clusters, int groups) {
  int const rows = cute::size<0>(typename Tile::Shape{});
  constexpr int kThreads = cute::size(typename Tile::Mma{});
  constexpr int kShared =
      Operation::template shared_bytes<typename Tile::Shape, typename Tile::Mma>();
  ek::RowRange const range{nullptr, &problem.options.number, problem.options.rows};
  simt::launch(dim3(cluster * clusters), dim3(kThreads * groups), kShared, [&] {
    ek::TileOrder const order(range, rows, cluster, splits);
    int const group = threadIdx.x / kThreads;
    int64_t unit = blockIdx.x / cluster + int64_t(group) * clusters;
    for (; order.has(unit); unit += clusters * groups) {
      int block, split;
      order.find(unit, blockIdx.x % cluster, block, split);
      auto* const shared = kShared ? reinterpret_cast<float*>(simt::dynamic_shared()) : nullptr;
      run_tile<Tile>(operation, problem, block, split, threadIdx.x % kThreads, shared);
      if (kShared) __syncthreads();
    }
  });
}

// The sums of a row over the columns of one split, in fp64, and how far off fp32 may be.
template <bool kStatistics>
void check_partial(Problem& problem, Memory const& partials, int t, int split, int splits,
                   int width, float inverse) {
  auto const& options = problem.options;
  int const first = split * width, last = std::min(first + width, options.vocabulary);
  double top = ek::kLowest, n = 0, sums[5] = {};
  double errors[5] = {1e-36, 1e-36, 1e-36, 1e-36, 1e-36};
  bool broken = false;
  for (int v = first; v < last; ++v) {
    float const z = problem.logit(t, v);
    top = std::fmax(top, double(z));
    broken |= std::isnan(z) || z == INFINITY;
  }
  for (int v = first; v < last; ++v) {
    double const d = (problem.logit(t, v) - top) * inverse / std::log(2.0), e = std::exp2(d);
    n += d == 0;
    if (d == 0 || e == 0) continue;
    double const terms[] = {e, d * e, d * d * e, e * e, d * e * e};
    for (int i = 0; i < 5; ++i) {
      sums[i] += terms[i];
      errors[i] += (3e-6 + 3e-7 * std::fabs(d)) * std::fabs(terms[i]);
    }
  }
  auto const field = [&](int i) {
    return partials[(size_t(i) * splits + split) * options.rows + t];
  };
  expect_same(options, "the maximum", t, split, field(0), top);
  if (broken) return expect_same(options, "s without an answer", t, split, field(2), kNan);
  expect_same(options, "n", t, split, field(1), n);
  for (int i = 0; i < (kStatistics ? 5 : 2); ++i)
    expect(std::fabs(field(2 + i) - sums[i]) <= errors[i], options, "a sum", t, 2 + i, field(2 + i),
           sums[i]);
}

template <class Tile, bool kStatistics>
void check(Options const& options, int cluster = 1, int clusters = 0, int groups = 1) {
  Problem problem(options);
  int const T = options.rows, V = options.vocabulary;
  int const width = cute::size<1>(typename Tile::Shape{}), splits = (V + width - 1) / width;
  int const blocks = (T + 127) / 128;
  int const fields = kStatistics ? 7 : 4;
  Memory partials(size_t(fields) * splits * T), at_target(T), logits(size_t(T) * V);
  ek::Forward const out{partials.data(),
                        at_target.data(),
                        problem.target.data(),
                        problem.index.data(),
                        &problem.options.number,
                        options.logits ? logits.data() - int64_t(kFar) * V : nullptr,
                        kStatistics,
                        splits};
  run_grid<Tile>(ek::ForwardTile<kStatistics>{problem.head(), out}, problem, splits, cluster,
                 clusters ? clusters : blocks * splits, groups);
  partials.check(options, "before and after partials");
  at_target.check(options, "before and after target_logit");
  logits.check(options, "before and after logits");
  for (int t = 0; t < T; ++t) {
    float const inverse = options.stride_temperature < 0
                              ? 1.0f
                              : 1.0f / problem.temperature[t * options.stride_temperature];
    bool const there = t < options.number;
    for (int split = 0; split < splits; ++split) {
      for (int i = 0; !there && i < fields; ++i)
        expect_same(options, "an absent row", t, split,
                    partials[(size_t(i) * splits + split) * T + t], kPoison);
      if (there) check_partial<kStatistics>(problem, partials, t, split, splits, width, inverse);
    }
    int64_t const target = problem.target[t];
    bool const has = there && target >= 0 && target < V;
    expect_same(options, "the target's logit", t, int(target), at_target[t],
                has ? problem.logit(t, int(target)) : kPoison);
    for (int v = 0; v < V; ++v)
      expect_same(options, "a kept logit", t, v, logits[size_t(problem.index[t] - kFar) * V + v],
                  there && options.logits ? problem.product[size_t(t) * V + v] : kPoison);
  }
}

}  // namespace grid
