// The rows of whole grids as the epilogue of sm_100 sums them, on the host, against fp64: every
// thread of every block, those too that only round the grid up to clusters.
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "row_tile.h"

namespace {

constexpr int kRows = 128, kCluster = 2, kEdge = 64;
constexpr int kFar = 1 << 26;  // rows of logits before the first, which are not there
constexpr float kPoison = 12345.0f;
constexpr double kEpsilon = 5.97e-8;

struct Case {
  char const* name;
  int rows, number, vocabulary;
  bool bias, softcap, kept;
  int temperatures;  // 0: none, 1: one for all, 2: one per row
};

int failures = 0;

void expect(bool right, Case const& what, char const* field, int row, int split, double got,
            double wanted) {
  if (right) return;
  if (++failures <= 20)
    std::printf("%s: %s of row %d, split %d: got %.9g, wanted %.9g\n", what.name, field, row, split,
                got, wanted);
}

// Products with rows of every kind.
std::vector<float> products(Case const& of) {
  std::mt19937 random(of.rows * 31 + of.vocabulary);
  std::normal_distribution<float> normal(0.0f, 6.0f);
  std::vector<float> z(size_t(of.rows) * of.vocabulary);
  for (float& x : z) x = normal(random);
  auto const row = [&](int t) { return t < of.rows ? &z[size_t(t) * of.vocabulary] : nullptr; };
  for (int v = 0; v < of.vocabulary; ++v) {
    if (row(3) && v % 7 == 0) row(3)[v] = 31.0f;              // ties, in all chunks
    if (row(5) && v == of.vocabulary / 2) row(5)[v] = 60.0f;  // nearly certain
    if (row(7)) row(7)[v] = 2.0f;
    if (row(9) && v < of.vocabulary - 1) row(9)[v] = -INFINITY;
    if (row(11) && v == of.vocabulary / 3) row(11)[v] = NAN;
    if (row(13) && v == of.vocabulary / 3) row(13)[v] = INFINITY;
    if (row(15)) row(15)[v] = -INFINITY;
    if (row(17)) row(17)[v] -= 1e4f;
    if (row(19) && v % 64 == 63) row(19)[v] = 40.0f + v / 64;  // a larger one in each chunk
    if (row(21) && v % 64 == 0) row(21)[v] = 40.0f - v / 64;
  }
  return z;
}

template <bool kStatistics>
struct Grid {
  Case what;
  std::vector<float> z = products(what), temperature, partials, target_logit, logits;
  std::vector<uint16_t> bias;
  std::vector<int64_t> target;
  std::vector<int> index;
  int splits = (what.vocabulary + ek::kRowColumns - 1) / ek::kRowColumns;
  ek::Head head{};
  ek::Forward out{};

  explicit Grid(Case const& of) : what(of) {
    std::mt19937 random(of.number + of.vocabulary);
    // Memory ends with the last of them.
    temperature.reserve(of.rows);
    bias.reserve(of.vocabulary);
    for (int t = 0; t < of.rows; ++t) temperature.push_back(0.6f + 0.002f * t);
    for (int v = 0; v < of.vocabulary; ++v) bias.push_back(uint16_t(0x3f00 + random() % 256));
    for (int t = 0; t < of.rows; ++t) target.push_back(random() % of.vocabulary);
    if (of.rows > 25) {
      target[23] = -100;
      target[24] = of.vocabulary;
      target[25] = of.vocabulary - 1;
    }
    // Rows of `logits` in ascending order, with gaps.
    for (int t = 0, place = kFar; t < of.rows; ++t, place += 1 + random() % 2)
      index.push_back(place);
    partials.assign(size_t(kStatistics ? 7 : 4) * splits * of.rows + kEdge, kPoison);
    target_logit.assign(of.rows + kEdge, kPoison);
    logits.assign(of.kept ? size_t(index.back() - kFar + 1) * of.vocabulary + kEdge : 0, kPoison);
    head.rows = of.rows;
    head.vocabulary = of.vocabulary;
    if (of.bias) head.bias = bias.data();
    if (of.softcap) head.softcap = 20.0f;
    if (of.temperatures != 0) head.temperature = temperature.data();
    head.stride_temperature = of.temperatures == 2;
    out.partials = partials.data();
    out.target_logit = target_logit.data();
    out.target = target.data();
    out.index = index.data();
    out.number = &what.number;
    if (of.kept) out.logits = logits.data() - int64_t(kFar) * of.vocabulary;
    out.splits = splits;
  }

  void run() {
    int const blocks = (what.rows + kRows * kCluster - 1) / (kRows * kCluster) * kCluster;
    for (int block = 0; block < blocks; ++block)
      for (int split = 0; split < splits; ++split)
        for (int thread = 0; thread < kRows; ++thread) {
          int const row = block * kRows + thread, start = split * ek::kRowColumns;
          auto const load = [&](float (&chunk)[ek::kChunk], int number) {
            for (int j = 0; j < ek::kChunk; ++j) {
              int const v = start + number * ek::kChunk + j;
              bool const inside = row < what.rows && v < what.vocabulary;
              chunk[j] = inside ? z[size_t(row) * what.vocabulary + v] : 1e20f;
            }
          };
          ek::row_of_tile<kStatistics>(head, out, row, start, load);
        }
  }

  float logit(int row, int v) const {
    float x = z[size_t(row) * what.vocabulary + v];
    if (what.bias) x += ek::bf16_at(bias.data(), v);
    return what.softcap ? ek::capped(x, head.softcap) : x;
  }

  void check_row(int row, int split) const {
    float const inverse =
        what.temperatures == 0 ? 1.0f : 1.0f / temperature[what.temperatures == 2 ? row : 0];
    double const scale = ek::kLog2e * inverse;
    int const stop = std::min(what.vocabulary, (split + 1) * ek::kRowColumns);
    float top = ek::kLowest;
    bool answer = true;
    for (int v = split * ek::kRowColumns; v < stop; ++v) {
      float const x = logit(row, v);
      top = std::fmax(top, x);
      answer &= !std::isnan(x) && x != INFINITY;
    }
    // The sums, and what rounding may add to each.
    double sum[7] = {top}, bound[7] = {};
    for (int v = split * ek::kRowColumns; answer && v < stop; ++v) {
      double const d = (double(logit(row, v)) - top) * scale;
      if (d == 0) ++sum[1];
      double const e = std::exp2(d), terms[7] = {0,
                                                 0,
                                                 d == 0 ? 0 : e,
                                                 d == 0 ? 0 : d * e,
                                                 d * d * e,
                                                 d == 0 ? 0 : e * e,
                                                 d * e * e};
      for (int i = 2; i < 7 && e > 0; ++i) {
        sum[i] += terms[i];
        bound[i] += std::abs(terms[i]) * kEpsilon * (16 + 6 * std::abs(d)) + 1e-36;
      }
    }
    for (int i = 0; i < (kStatistics ? 7 : 4); ++i) {
      char const* const names[7] = {"m", "n", "s", "u", "w", "q", "r"};
      double const got = partials[(size_t(i) * splits + split) * what.rows + row];
      if (answer)
        expect(std::abs(got - sum[i]) <= bound[i], what, names[i], row, split, got, sum[i]);
      else if (i == 2)
        expect(std::isnan(got), what, "s", row, split, got, NAN);
    }
  }

  static bool same(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

  void check() const {
    size_t const fields = kStatistics ? 7 : 4;
    for (int row = 0; row < what.rows; ++row) {
      for (int split = 0; split < splits; ++split) {
        if (row < what.number) check_row(row, split);
        for (size_t i = 0; row >= what.number && i < fields; ++i) {
          float const got = partials[(i * splits + split) * what.rows + row];
          expect(got == kPoison, what, "a row past the number", row, split, got, kPoison);
        }
      }
      bool const has = row < what.number && target[row] >= 0 && target[row] < what.vocabulary;
      float const wanted = has ? logit(row, int(target[row])) : kPoison;
      bool const right =
          same(target_logit[row], wanted) || (std::isnan(wanted) && std::isnan(target_logit[row]));
      expect(right, what, "target's logit", row, -1, target_logit[row], wanted);
    }
    for (int i = 0; i < kEdge; ++i) {
      float const a = partials[partials.size() - 1 - i], b = target_logit[what.rows + i];
      expect(a == kPoison && b == kPoison, what, "what lies beyond", -1, -1, a, kPoison);
    }
    check_logits();
  }

  void check_logits() const {
    std::vector<float> wanted(logits.size(), kPoison);
    for (int row = 0; what.kept && row < what.number; ++row)
      std::memcpy(&wanted[size_t(index[row] - kFar) * what.vocabulary],
                  &z[size_t(row) * what.vocabulary], sizeof(float) * what.vocabulary);
    for (size_t i = 0; i < wanted.size(); ++i)
      expect(same(logits[i], wanted[i]), what, "kept logit", int(i / what.vocabulary), -1,
             logits[i], wanted[i]);
  }
};

template <bool kStatistics>
void run(Case const& what) {
  Grid<kStatistics> grid(what);
  grid.run();
  grid.check();
}

}  // namespace

int main() {
  Case const cases[] = {
      {"plain", 256, 256, 512, false, false, false, 0},
      {"one row", 1, 1, 257, true, true, true, 2},
      {"one column", 30, 30, 1, true, false, true, 0},
      {"temperature", 30, 30, 300, false, false, false, 1},
      {"temperatures", 300, 290, 1031, false, false, false, 2},
      {"bias", 130, 130, 700, true, false, false, 0},
      {"softcap", 130, 130, 700, false, true, false, 0},
      {"kept", 130, 60, 700, false, false, true, 0},
      {"kept, odd", 130, 60, 321, false, false, true, 0},
      {"all", 300, 257, 708, true, true, true, 2},
      {"no row", 300, 0, 300, true, true, true, 2},
  };
  for (Case const& what : cases) {
    run<false>(what);
    run<true>(what);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
