// dz as the kernels write it: every tile of a grid, its threads as fibers, from products that stand
// in for those of the main loop, against fp64. With EK_ONE_TILE for one shape of tiles alone.
#include <sys/mman.h>

#include <cinttypes>
#include <cmath>
#include <cstring>
#include <random>

#include "dlogits_tile.h"
#include "tile_order.h"
#include "tiled_mma.h"

namespace {

struct Case {
  char const* name;
  int rows, vocabulary, start, stop, number, first;
  bool bias, bias_gradient, has_entropy;
  float softcap;
};
constexpr Case kCases[] = {
    {"plain", 200, 300, 0, 300, 200, -1, false, false, true, 0},
    {"everything", 300, 700, 64, 64 + 331, 290, -1, true, true, true, 30},
    {"no_entropy", 130, 515, 0, 515, 100, -1, false, true, false, 0},
    {"softcap", 40, 264, 8, 264, 40, -1, false, false, true, 8},
    {"first", 420, 136, 0, 136, 400, 256, true, true, true, 0},
    {"one", 1, 1, 0, 1, 7, -1, true, true, true, 0},
    {"narrow", 17, 40, 32, 39, 17, -1, false, true, true, 0},
    {"empty", 140, 136, 0, 136, 0, -1, false, true, true, 0},
    {"all_read", 300, 136, 0, 136, 200, 200, false, true, true, 0},
};
constexpr float kNan = NAN, kInfinity = INFINITY;
constexpr double kEpsilon = 0x1p-24;
int wrong = 0;

__attribute__((format(printf, 1, 2))) void say(char const* text, ...) {
  if (++wrong > 20) return;
  va_list arguments;
  va_start(arguments, text);
  std::vprintf(text, arguments);
  va_end(arguments);
  std::puts("");
}

struct Rows {
  Case of;
  std::mt19937 generator;
  std::vector<float> z, fields;  // [C, V] products, [6, C]
  std::vector<uint16_t> bias;
  std::vector<int64_t> target;
  std::vector<double> peak;

  Rows(Case const& of, int tile)
      : of(of), generator(of.rows * 31 + of.vocabulary), z(size_t(of.rows) * of.vocabulary),
        fields(6 * of.rows, kNan), bias(of.vocabulary), target(of.rows, -1), peak(of.rows) {
    for (auto& b : bias) b = cute::bfloat16_t(normal()).storage;
    for (int t = 0; t < of.rows; ++t) fill(t, tile);
  }

  float normal() { return std::normal_distribution<float>()(generator); }
  float& at(int t, int v) { return z[size_t(t) * of.vocabulary + v]; }
  float logit(int t, int v) { return at(t, v) + (of.bias ? ek::bf16_at(bias.data(), v) : 0.0f); }
  double cap(double x) const { return of.softcap ? of.softcap * std::tanh(x / of.softcap) : x; }

  // Its kind changes from row to row.
  void fill(int t, int tile) {
    int const V = of.vocabulary, width = of.stop - of.start, kind = t % 8;
    int const edges[] = {of.start, of.stop - 1, of.start + (tile - 1) % width,
                         of.start + tile % width};
    for (int v = 0; v < V; ++v) at(t, v) = 5 * normal();
    target[t] = of.start + int(generator() % width);
    if (kind == 1) target[t] = edges[t / 8 % 4];
    if (kind == 4) target[t] = t / 8 % 2 ? (of.stop < V ? of.stop : -1) : of.start - 1;
    if (kind == 2)
      for (int v = t % 5; v < V; v += 5) at(t, v) = v % 2 ? -kInfinity : -3e38f;
    if (kind == 0) at(t, target[t]) = 40;  // nearly certain
    if (kind == 6) at(t, (target[t] + 3) % V) = at(t, target[t]);
    float top = -kInfinity;
    int argmax = 0;
    for (int v = 0; v < V; ++v) argmax = logit(t, v) > logit(t, argmax) ? v : argmax;
    top = logit(t, argmax);
    peak[t] = cap(top);
    float const inverse = 0.8f + 0.1f * (t % 5);
    double others = 0, mean = 0;  // the sum of p over all but the maximum, and of d p
    for (int v = 0; v < V; ++v) {
      double const d = (cap(logit(t, v)) - peak[t]) * inverse;
      others += v == argmax ? 0 : std::exp(d);
      mean += d == -kInfinity ? 0 : d * std::exp(d);
    }
    double const log_sum = std::log1p(others), entropy = log_sum - mean / (1 + others);
    if (kind == 3) at(t, of.start + t % width) = kNan;
    if (t >= of.number) return;  // its fields are of no use
    float const g_logprob = normal() * inverse;
    float const g_entropy = of.has_entropy ? normal() * inverse : 0.0f;
    double const rest = (kind == 0 ? 0 : normal() * inverse) - g_entropy * entropy;
    float const values[] = {of.softcap ? ek::capped(top, of.softcap) : top,
                            inverse,
                            float(log_sum),
                            g_logprob,
                            of.has_entropy ? g_entropy : kNan,
                            kind == 5 ? kNan : float(rest)};
    for (int f = 0; f < 6; ++f) fields[f * of.rows + t] = values[f];
  }

  // dz, and how far fp32 may be from it.
  struct Truth {
    double dz, error;
  };
  Truth truth(int t, int v) {
    auto const field = [&](int f) { return double(fields[f * of.rows + t]); };
    double const x = logit(t, v), inverse = field(1), log_sum = field(2), g_logprob = field(3);
    double const d = (cap(x) - peak[t]) * inverse, rest = field(5);
    double const cosine = of.softcap ? std::cosh(x / of.softcap) : 1;
    double const slope = 1 / (cosine * cosine);
    double logp = d - log_sum;
    logp = logp < -1e4 ? -1e4 : logp;
    double const p = std::exp(logp);
    double const bonus = of.has_entropy ? p * field(4) * logp : 0;
    double const policy = v == target[t] ? g_logprob * std::expm1(logp) : p * g_logprob;
    double const dz = slope * (p * rest - bonus - policy);
    double const size = slope * (std::abs(p * rest) + std::abs(bonus) + std::abs(policy));
    double const distance = std::isinf(d) ? 0 : std::abs(d);
    double const capping = d == 0 ? 0 : 1e-6 * of.softcap * inverse;
    double const error = kEpsilon * (3 * distance + 2 * log_sum) + capping;  // of log p
    double const at_target = v == target[t] ? slope * p * std::abs(g_logprob) * error : 0;
    return {dz, size * (error + kEpsilon * (20 + 2 * std::abs(logp))) + at_target + 1e-38};
  }
};

template <class Tile>
struct Layout {
  using Shape = typename Tile::Shape;
  using Mma = typename Tile::Mma;
  static constexpr int kRows = cute::size<0>(Shape{}), kColumns = cute::size<1>(Shape{});
  static constexpr int kThreads = cute::size(Mma{});
};

template <class Tile, class View>
void fill_fragment(View&& z, int thread, Rows& rows, int block, int split, int end) {
  using L = Layout<Tile>;
  auto const c = ek::coordinates(typename L::Shape{}, typename L::Mma{}, thread);
  for (int i = 0; i < cute::size<0>(z); ++i)
    for (int j = 0; j < cute::size<1>(z); ++j) {
      int const t = block * L::kRows + cute::get<0>(c(i, j));
      int const v = rows.of.start + split * L::kColumns + cute::get<1>(c(i, j));
      z(i, j) = t < end && v < rows.of.stop ? rows.at(t, v) : kNan;
    }
}

// The persistent kernel, with the operation in place of a main loop and it.
template <class Tile>
void launch(ek::DlogitsTile const& operation, Rows& rows, int cluster) {
  using L = Layout<Tile>;
  ek::RowRange const range{operation.out.first, operation.out.number, rows.of.rows};
  int const splits = (rows.of.stop - rows.of.start + L::kColumns - 1) / L::kColumns;
  simt::launch(dim3(2 * cluster), dim3(L::kThreads), 0, [&] {
    ek::TileOrder const order(range, L::kRows, cluster, splits);
    int const rank = blockIdx.x % cluster;
    for (int64_t unit = blockIdx.x / cluster; order.has(unit); unit += gridDim.x / cluster) {
      int block, split;
      order.find(unit, rank, block, split);
      typename L::Shape const tile;
      typename L::Mma const mma;
      auto accumulators = cute::partition_fragment_C(mma, cute::select<0, 1>(tile));
      int const thread = int(threadIdx.x);
      fill_fragment<Tile>(ek::rows_and_columns(accumulators), thread, rows, block, split,
                          range.end());
      operation(tile, block, split, range.end(), accumulators, mma, thread, nullptr);
    }
  });
}

struct Written {
  static constexpr uint16_t kPoison = 0x4abc;
  static constexpr float kPoisonSum = 12345;
  int64_t stride, guard;  // numbers before and after what kernels write: rows of two tiles
  std::vector<uint4> dz_bytes;
  std::vector<float> sums;

  explicit Written(Case const& of)
      : stride((of.stop - of.start + 7) / 8 * 8 + 16), guard(256 * stride),
        dz_bytes((of.rows * stride + 2 * guard) / 8),
        sums((of.rows + 15) / 16 * stride + 2 * guard, kPoisonSum) {
    std::fill(all(), all() + dz_bytes.size() * 8, kPoison);
  }
  uint16_t* all() { return reinterpret_cast<uint16_t*>(dz_bytes.data()); }
  uint16_t* dz() { return all() + guard; }
};

// The nearest bf16 may be half a unit of the last place away.
double half_unit(double x) { return x == 0 || x != x ? 0 : std::ldexp(1, std::ilogb(x) - 8); }

bool near(double got, double wanted, double error) {
  return wanted != wanted ? got != got : std::abs(got - wanted) <= error;
}

void compare(Rows& rows, Written& written, int first, int end) {
  Case const& of = rows.of;
  int const columns = of.stop - of.start;
  std::vector<double> sum(written.sums.size()), error(written.sums.size());
  std::vector<bool> summed(written.sums.size());
  for (int64_t i = 0; i < int64_t(written.dz_bytes.size()) * 8; ++i) {
    int64_t const t = (i - written.guard) / written.stride,
                  n = (i - written.guard) % written.stride;
    uint16_t const bits = written.all()[i];
    if (i < written.guard || t < first || t >= end || n >= columns) {
      if (bits != Written::kPoison)
        say("%s: dz[%" PRId64 ", %" PRId64 "] is written", of.name, t, n);
      continue;
    }
    auto const truth = rows.truth(int(t), of.start + int(n));
    double const got = ek::bf16_at(&bits, 0);
    if (!near(got, truth.dz, half_unit(truth.dz) + truth.error))
      say("%s: dz[%" PRId64 ", %" PRId64 "] is %g; wanted %g", of.name, t, n, got, truth.dz);
    size_t const at = written.guard + t / 16 * written.stride + n;
    sum[at] += truth.dz;
    error[at] += truth.error + 8 * kEpsilon * std::abs(truth.dz);
    summed[at] = of.bias_gradient;
  }
  for (size_t i = 0; i < written.sums.size(); ++i)
    if (!near(written.sums[i], summed[i] ? sum[i] : Written::kPoisonSum, summed[i] ? error[i] : 0))
      say("%s: partial %zu is %g; wanted %g", of.name, i, written.sums[i],
          summed[i] ? sum[i] : Written::kPoisonSum);
}

ek::DlogitsTile operation_of(Rows const& rows, Case const& of, void* dz, int64_t stride,
                             float* sums) {
  ek::DlogitsTile operation{};
  operation.head.bias = of.bias ? rows.bias.data() : nullptr;
  operation.head.softcap = of.softcap;
  operation.head.rows = of.rows;
  operation.head.vocabulary = of.vocabulary;
  operation.out = {rows.fields.data(),
                   rows.target.data(),
                   of.first < 0 ? nullptr : &of.first,
                   &of.number,
                   dz,
                   stride,
                   of.bias_gradient ? sums : nullptr,
                   of.start,
                   of.stop,
                   of.has_entropy};
  return operation;
}

template <class Tile>
void check(Case const& of, int cluster) {
  Rows rows(of, Layout<Tile>::kColumns);
  Written written(of);
  float* const sums = written.sums.data() + written.guard;
  launch<Tile>(operation_of(rows, of, written.dz(), written.stride, sums), rows, cluster);
  compare(rows, written, of.first < 0 ? 0 : of.first, of.number < of.rows ? of.number : of.rows);
}

// Rows 2^32 columns apart, in memory that nobody else touches: as those that lie together.
template <class Tile>
void check_far(int cluster) {
  Case const of = {"far", 40, 40, 8, 40, 40, -1, true, true, true, 0};
  int const rows_of_sums = 3;
  int64_t const stride = int64_t(1) << 32, count = of.rows * stride;
  size_t const bytes = size_t(count) * 2 + size_t(rows_of_sums) * stride * 4;
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return say("no memory of %zu bytes", bytes);
  auto* const dz = static_cast<uint16_t*>(memory);
  auto* const sums = reinterpret_cast<float*>(dz + count);
  Rows rows(of, Layout<Tile>::kColumns);
  Written near(of);
  float* const near_sums = near.sums.data() + near.guard;
  launch<Tile>(operation_of(rows, of, near.dz(), near.stride, near_sums), rows, cluster);
  launch<Tile>(operation_of(rows, of, dz, stride, sums), rows, cluster);
  for (int n = 0; n < of.stop - of.start; ++n) {
    for (int t = 0; t < of.rows; ++t)
      if (dz[t * stride + n] != near.dz()[t * near.stride + n]) say("far: dz[%d, %d]", t, n);
    for (int i = 0; i < rows_of_sums; ++i)
      if (std::memcmp(&sums[i * stride + n], &near_sums[i * near.stride + n], sizeof(float)))
        say("far: partial [%d, %d]", i, n);
  }
  munmap(memory, bytes);
}

// What dlogits_tile.h takes for granted of each thread's rows and columns.
template <class Tile>
void check_layout(int neighbours) {
  using L = Layout<Tile>;
  for (int thread = 0; thread < L::kThreads; ++thread) {
    auto const c = ek::coordinates(typename L::Shape{}, typename L::Mma{}, thread);
    int const lane = thread % 32;
    constexpr int I = decltype(cute::size<0>(c))::value, J = decltype(cute::size<1>(c))::value;
    static_assert(I % 2 == 0 && J % ek::kStored == 0);
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j) {
        int const row = cute::get<0>(c(i, j)), column = cute::get<1>(c(i, j));
        int const k = j % ek::kStored, first = cute::get<0>(c(i - i % 2, 0)) - lane / 4;
        if (first % ek::kBiasRows || row != first + lane / 4 + i % 2 * 8)
          say("thread %d, row %d of its view: is %d of the tile", thread, i, row);
        int const group = cute::get<1>(c(0, j - k)) - cute::get<1>(c(0, 0));
        if (column != cute::get<1>(c(0, k)) + group || column % 8 != lane % 4 * 2 + j % 2)
          say("thread %d, column %d of its view: is %d of the tile", thread, j, column);
        // A quad stores `neighbours` times 16 bytes without a gap.
        int const before = cute::get<1>(c(0, j - k + k / 2 / neighbours * neighbours * 2));
        if (column / 8 != before / 8 + k / 2 % neighbours)
          say("thread %d, column %d of its view: is %d of the tile", thread, j, column);
      }
  }
}

template <class Tile>
void run(int cluster, int neighbours) {
  check_layout<Tile>(neighbours);
  for (Case const& each : kCases) check<Tile>(each, cluster);
  // A kernel that is wrong near by may write where there is no memory.
  if (wrong == 0) check_far<Tile>(cluster);
}

}  // namespace

int main() {
  run<ek::Sm90Tile<128>>(2, 4);
#ifndef EK_ONE_TILE
  run<ek::Sm90Tile<256>>(2, 4);
  run<ek::Sm80Tile>(1, 4);
#endif
  std::printf("%d numbers are wrong\n", wrong);
  return wrong != 0;
}
