// The formulas of logits.h and the sums of row_sums.h against fp64: rows in pieces of any size,
// merged in any order.
#include <sys/mman.h>

#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "row_sums.h"

namespace {

constexpr float kPoison = 12345.678f;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
bool right = true;

void expect(bool holds, char const* what, double got, double wanted) {
  if (!holds) std::printf("%s: got %.9g; wanted %.9g\n", what, got, wanted);
  right &= holds;
}

// A NaN is no number within any distance.
void expect_near(char const* what, double got, double wanted, double distance) {
  expect(std::fabs(got - wanted) <= distance, what, got, wanted);
}

void expect_same(char const* what, double got, double wanted) {
  expect(got == wanted || (std::isnan(got) && std::isnan(wanted)), what, got, wanted);
}

void check_formulas() {
  float const nan = NAN;
  for (float x = -20.0f; x < 20.0f; x += 0.00213f) {
    double const t = std::tanh(double(x)), c = std::cosh(double(x));
    expect_near("tanh", ek::tanh(x), t, 2e-7 * std::fabs(t));
    expect_near("tanh_slope", ek::tanh_slope(x), 1 / (c * c), 3e-6 / (c * c));
    double const cap = 30 * std::tanh(x * 4.0 / 30), near = 1 / std::cosh(x * 4.0 / 30);
    expect_near("capped", ek::capped(4.0f * x, 30.0f), cap, 4e-7 * std::fabs(cap));
    expect_near("cap_slope", ek::cap_slope(4.0f * x, 30.0f), near * near, 3e-6 * near * near);
    if (x <= 0) expect_near("expm1", ek::expm1(x), std::expm1(x), 2e-7 * -std::expm1(x));
    if (x >= 0) expect_near("log1p", ek::log1p(x), std::log1p(x), 2e-7 * std::log1p(x));
  }
  for (float x = 1e-12f; x < 1e-3f; x *= 1.37f) {
    expect_near("tanh near 0", ek::tanh(-x), std::tanh(double(-x)), 2e-7 * x);
    expect_near("expm1 near 0", ek::expm1(-x), std::expm1(double(-x)), 2e-7 * x);
    expect_near("log1p near 0", ek::log1p(x), std::log1p(double(x)), 2e-7 * x);
  }
  expect_same("tanh of NaN", ek::tanh(nan), nan);
  expect_same("tanh_slope of NaN", ek::tanh_slope(nan), nan);
  expect_same("expm1 of NaN", ek::expm1(nan), nan);
  expect_same("log1p of NaN", ek::log1p(nan), nan);
  expect_same("tanh of -inf", ek::tanh(-INFINITY), -1);
  uint16_t const halves[] = {0x3f80, 0xc0a0, 0x7f80};  // 1, -5, inf
  expect_same("bf16", ek::bf16_at(halves, 1), -5);
  expect_same("bf16 inf", ek::bf16_at(halves, 2), kInfinity);
  float const temperatures[] = {2, 3, 4};
  expect_same("one temperature", ek::inverse_temperature(temperatures, 0, 7), 0.5);
  expect_same("temperature of a row", ek::inverse_temperature(temperatures, 2, 1), 0.25);
  expect_same("no temperature", ek::inverse_temperature(nullptr, 2, 1), 1);
}

template <bool kStatistics>
ek::RowSums sums_of(float const* z, int count, float scale) {
  ek::RowSums sums;
  for (int j = 0; j < count; ++j) sums.m = ek::larger(sums.m, z[j]);
  for (int j = 0; j < count; ++j) ek::add_column<kStatistics>(sums, z[j], scale);
  return sums;
}

// Pieces of `piece` columns, stored and loaded as partials, merged first to last or last to first.
template <bool kStatistics>
ek::RowSums sums_in_pieces(std::vector<float> const& z, int piece, bool backward, float scale) {
  int const splits = (int(z.size()) + piece - 1) / piece;
  std::vector<float> partials((kStatistics ? 7 : 4) * splits * 3, kPoison);
  for (int split = 0; split < splits; ++split) {
    int const left = int(z.size()) - split * piece;
    ek::store_sums<kStatistics>(
        partials.data(), split, splits, 1, 3,
        sums_of<kStatistics>(&z[split * piece], std::min(piece, left), scale));
  }
  for (size_t i = 0; i < partials.size(); ++i)
    expect((partials[i] == kPoison) == (i % 3 != 1), "the row's own partials alone are stored",
           partials[i], double(i));
  ek::RowSums sums;
  for (int i = 0; i < splits; ++i) {
    int const split = backward ? splits - 1 - i : i;
    sums = ek::merged<kStatistics>(
        sums, ek::load_sums<kStatistics>(partials.data(), split, splits, 1, 3), scale);
  }
  return sums;
}

// Offsets of 2^32 and more, in memory that nobody else touches; of 32 bits would be too small.
void check_far() {
  int const rows = 1 << 30, splits = 8, split = 4, row = 5;
  size_t const count = size_t(7) * splits * rows;
  void* const memory = mmap(nullptr, count * sizeof(float), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  expect(memory != MAP_FAILED, "memory", 0, count);
  if (memory == MAP_FAILED) return;
  auto* const partials = static_cast<float*>(memory);
  ek::store_sums<true>(partials, split, splits, row, rows, {1, 2, 3, 4, 5, 6, 7});
  auto const got = ek::load_sums<true>(partials, split, splits, row, rows);
  float const loaded[] = {got.m, got.n, got.s, got.u, got.w, got.q, got.r};
  for (int i = 0; i < 7; ++i) {
    expect_same("stored far away", partials[(size_t(i) * splits + split) * rows + row], i + 1);
    expect_same("loaded from far away", loaded[i], i + 1);
  }
  partials[int64_t(1) << 32] = 4;
  expect_same("a far temperature", ek::inverse_temperature(partials, int64_t(1) << 32, 1), 0.25);
  munmap(memory, count * sizeof(float));
}

void check_row(char const* what, std::vector<float> const& z, float inverse) {
  float const scale = inverse * ek::kLog2e;
  // Terms, and the error of each: d is rounded before it becomes an exponent.
  double top = -kInfinity, n = 0, sums[5] = {}, errors[5] = {1e-37, 1e-37, 1e-37, 1e-37, 1e-37};
  for (float const x : z) top = std::fmax(top, x);
  for (float const x : z) {
    double const d = (double(x) - top) * inverse / std::log(2.0), e = std::exp2(d);
    n += d == 0;
    if (d == 0 || e == 0) continue;
    double const terms[] = {e, d * e, d * d * e, e * e, d * e * e};
    for (int i = 0; i < 5; ++i) {
      sums[i] += terms[i];
      errors[i] += (2e-6 + 3e-7 * std::fabs(d)) * std::fabs(terms[i]);
    }
  }
  for (int const piece : {1, 3, 64, 1000}) {
    for (bool const backward : {false, true}) {
      auto const got = sums_in_pieces<true>(z, piece, backward, scale);
      auto const plain = sums_in_pieces<false>(z, piece, backward, scale);
      expect_same(what, got.m, top);
      expect_same(what, got.n, n);
      float const mine[] = {got.s, got.u, got.w, got.q, got.r};
      for (int i = 0; i < 5; ++i) expect_near(what, mine[i], sums[i], errors[i]);
      for (auto const field : {&ek::RowSums::m, &ek::RowSums::n, &ek::RowSums::s, &ek::RowSums::u})
        expect_same("without statistics", plain.*field, got.*field);
    }
  }
}

void check_rows() {
  std::mt19937 random(1);
  for (float const spread : {0.5f, 4.0f, 30.0f}) {
    for (float const inverse : {1.0f, 1 / 0.7f, 0.25f}) {
      std::vector<float> z(777);
      std::normal_distribution<float> normal(3.0f, spread);
      for (float& x : z) x = normal(random);
      check_row("random", z, inverse);
      for (size_t j = 5; j < z.size(); j += 50) z[j] = z[5];
      check_row("ties", z, inverse);
      for (size_t j = 0; j < z.size(); j += 100) z[j] = 200;
      check_row("tied maxima", z, inverse);
      for (size_t j = 1; j < z.size(); j += 2) z[j] = -INFINITY;
      check_row("some -inf", z, inverse);
    }
  }
  std::vector<float> z(300, 0.0f);
  z[17] = 30;  // an entropy near 1e-9
  check_row("nearly certain", z, 1);
  check_row("equal", std::vector<float>(130, -5.0f), 1);
  check_row("very low", {-1e29f, -1e29f, -2e29f}, 1);
}

void check_no_answer() {
  for (int const piece : {1, 2, 64}) {
    auto const empty = sums_in_pieces<true>(std::vector<float>(65, -INFINITY), piece, false, 1);
    expect_same("-inf throughout", empty.m, ek::kLowest);
    expect_same("-inf throughout", empty.s + empty.n, 0);
    for (float const bad : {NAN, INFINITY}) {
      std::vector<float> z(65, 1.0f);
      for (size_t const at : {size_t(0), size_t(40), z.size() - 1}) {
        z.assign(65, 1.0f);
        z[at] = bad;
        if (at == 0) z.assign(65, bad);
        expect_same("no answer", sums_in_pieces<true>(z, piece, at == 40, 1).s, NAN);
      }
    }
  }
}

}  // namespace

int main() {
  check_formulas();
  check_far();
  check_rows();
  check_no_answer();
  return !right;
}
