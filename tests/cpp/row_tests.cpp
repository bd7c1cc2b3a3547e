// Products of pairs of rows and entropies of rows of logits, for every instruction set.
#include <algorithm>
#include <cstring>
#include <limits>

#include "bits.h"
#include "problem.h"
#include "tests.h"

namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kRounding = 0x1p-24;

bool never() { return false; }

template <class Test>
void for_each_set(Test test) {
  const Kernels* model = entropy_kernels::model_kernels();
  if (model != nullptr) test(*model);
  for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i) test(*kernels);
}

std::string label(const Kernels& kernels, Dtype dtype, const char* what) {
  return std::string(kernels.name) + " " + name_of(dtype) + " " + what;
}

// Rows of a dtype, `dim` values each and 3 more between them, of which row 0 is NaN.
struct Values {
  std::vector<float> values;
  std::vector<char> bytes;
  std::int64_t dim;
  Dtype dtype;

  Values(std::int64_t rows, std::int64_t dim, Dtype dtype, Random& random)
      : dim(dim), dtype(dtype) {
    for (std::int64_t i = 0; i < rows * dim; ++i)
      values.push_back(i < dim ? kNan : rounded(float(random.normal()), dtype));
    bytes = encoded(values, dim, dim + 3, dtype);
  }

  const float* row(std::int64_t i) const { return values.data() + i * dim; }
  entropy_kernels::Matrix matrix() const { return {bytes.data(), dim + 3, dtype}; }

  // Value `d` of row `i`, from the bytes.
  float stored(std::int64_t i, std::int64_t d) const {
    const std::int64_t at = i * (dim + 3) + d;
    if (dtype == Dtype::f32) return read_as<float>(bytes.data() + 4 * at);
    return decode(read_as<std::uint16_t>(bytes.data() + 2 * at), dtype);
  }
};

void test_dots(const Kernels& kernels, Dtype dtype, std::int64_t dim, Report& report) {
  Random random;
  const Values left(20, dim, dtype, random), right(50, dim, dtype, random);
  const std::int64_t pairs = 1500;
  std::vector<std::int64_t> i, j;
  for (std::int64_t n = 0; n < pairs; ++n) {
    i.push_back(n % 17 == 0 ? 0 : 1 + n / 80);
    j.push_back(1 + std::int64_t(random.uniform() * 49));
  }
  std::vector<float> out(pairs), again(pairs);
  for (const int threads : {1, 3}) {
    const entropy_kernels::PairDots call{left.matrix(), right.matrix(),
                                         i.data(),      j.data(),
                                         pairs,         dim,
                                         threads,       threads == 1 ? out.data() : again.data()};
    report.require(kernels.pair_dots(call, never) == pairs * dim,
                   label(kernels, dtype, "pair_dots counts its products"));
  }
  report.require(std::memcmp(out.data(), again.data(), pairs * 4) == 0,
                 label(kernels, dtype, "pair_dots: the same bits at any number of threads"));
  for (std::int64_t n = 0; n < pairs; ++n) {
    if (i[n] == 0) {
      report.require(out[n] != out[n], label(kernels, dtype, "pair_dots: NaN in its pairs"));
      continue;
    }
    double want = 0, size = 0;
    for (std::int64_t d = 0; d < dim; ++d) {
      const double product = double(left.row(i[n])[d]) * right.row(j[n])[d];
      want += product, size += std::fabs(product);
    }
    report.close(out[n], want, (dim / 16 + 24) * kRounding * size,
                 label(kernels, dtype, "pair_dots"), long(n));
  }
}

// Runs of 1 to 1100 pairs; a third of the scales is 0, and so are all of some runs.
struct Runs {
  std::vector<float> scale;
  std::vector<std::int64_t> row, place;
  std::int64_t places = 0;

  explicit Runs(Random& random) {
    for (const int length : {1, 2, 1, 3, 1100, 1, 512, 513, 7, 511, 40, 1, 1}) {
      for (int k = 0; k < length; ++k) {
        const bool zero = places % 4 == 3 || random.uniform() < 0.3;
        scale.push_back(zero ? 0 : float(random.normal()));
        row.push_back(zero ? 0 : 1 + std::int64_t(random.uniform() * 29));
        place.push_back(places);
      }
      ++places;
    }
  }
};

void test_sums(const Kernels& kernels, Dtype dtype, Dtype out_dtype, bool add, std::int64_t dim,
               Report& report) {
  Random random;
  const Values rows(30, dim, dtype, random);
  const Runs runs(random);
  const std::int64_t pairs = std::int64_t(runs.scale.size());
  const Values before(runs.places, dim, out_dtype, random);
  Values out = before, again = before;
  std::int64_t products = 0;
  for (const float scale : runs.scale) products += scale != 0 ? dim : 0;
  for (const int threads : {1, 3}) {
    Values& to = threads == 1 ? out : again;
    const entropy_kernels::PairSums call{
        runs.scale.data(), rows.matrix(),   runs.row.data(), runs.place.data(), pairs, dim,
        threads,           to.bytes.data(), dim + 3,         out_dtype,         add};
    report.require(kernels.pair_sums(call, never) == products,
                   label(kernels, dtype, "pair_sums counts its products"));
  }
  report.require(out.bytes == again.bytes,
                 label(kernels, dtype, "pair_sums: the same bits at any number of threads"));
  for (std::int64_t p = 0; p < runs.places; ++p)
    for (std::int64_t d = 0; d < dim; ++d) {
      const double old = before.row(p)[d], got = out.stored(p, d);
      double want = 0, size = 0;
      int length = 0;
      for (std::int64_t n = 0; n < pairs; ++n)
        if (runs.place[n] == p && runs.scale[n] != 0) {
          const double term = double(runs.scale[n]) * rows.row(runs.row[n])[d];
          want += term, size += std::fabs(term), ++length;
        }
      if (length == 0 || (add && old != old)) {
        report.require(got == old || (got != got && old != old),
                       label(kernels, dtype, "pair_sums leaves a run of zeros as it is"));
        continue;
      }
      if (add) want += old, size += std::fabs(old);
      const double last = out_dtype == Dtype::f32    ? kRounding
                          : out_dtype == Dtype::bf16 ? 0x1p-8
                                                     : 0x1p-11;
      report.close(
          got, want,
          (std::min(length, 512) + 6) * kRounding * size + 1.01 * last * std::fabs(want) + 0x1p-25,
          label(kernels, dtype, "pair_sums"), long(p * dim + d));
    }
}

struct Logits {
  std::vector<float> values;
  double temperature;
};

double true_entropy(const Logits& row) {
  std::vector<double> z;
  for (const float x : row.values) z.push_back(x / row.temperature);
  const auto top = std::max_element(z.begin(), z.end());
  double s = 0, t = 0;
  for (auto it = z.begin(); it != z.end(); ++it) {
    const double d = *it - *top, e = std::exp(d);
    if (it == top || e == 0) continue;
    s += e, t += d * e;
  }
  return std::log1p(s) - t / (1 + s);
}

void test_entropies(const Kernels& kernels, Dtype dtype, std::int64_t vocabulary, bool tempered,
                    Report& report) {
  Random random;
  const std::int64_t rows = 6;
  std::vector<float> values, temperature;
  for (std::int64_t r = 0; r < rows; ++r) {
    temperature.push_back(tempered ? float(0.5 + random.uniform()) : 1.0f);
    const double spread[] = {0, 1, 5, 30, 3, 3};
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      const bool out = r >= 3 && v % 3 == 1;
      const double x = v == vocabulary / 2 ? 4 * spread[r] : spread[r] * random.normal();
      values.push_back(out ? -kInfinity : rounded(float(x), dtype));
    }
  }
  for (std::int64_t v = 0; v < vocabulary; ++v) values[4 * vocabulary + v] = -kInfinity;
  values[6 * vocabulary - 1] = kNan;
  const std::vector<char> bytes = encoded(values, vocabulary, vocabulary + 3, dtype);
  std::vector<float> out(rows), again(rows);
  for (const int threads : {1, 3})
    kernels.row_entropies({{bytes.data(), vocabulary + 3, dtype},
                           tempered ? temperature.data() : nullptr,
                           1,
                           rows,
                           vocabulary,
                           threads,
                           threads == 1 ? out.data() : again.data()},
                          never);
  report.require(std::memcmp(out.data(), again.data(), rows * 4) == 0,
                 label(kernels, dtype, "row_entropies: the same bits at any number of threads"));
  for (std::int64_t r = 0; r < rows; ++r) {
    if (r >= 4) {
      report.require(out[r] != out[r], label(kernels, dtype, "row_entropies: no distribution"));
      continue;
    }
    const auto begin = values.begin() + r * vocabulary;
    const Logits row{{begin, begin + vocabulary}, temperature[r]};
    if (*std::max_element(begin, begin + vocabulary) == -kInfinity) continue;
    const double want = true_entropy(row);
    report.close(out[r], want, 4e-6 * want + 1e-30, label(kernels, dtype, "row_entropies"),
                 long(r));
  }
}

}  // namespace

void test_pair_products(Report& report) {
  for_each_set([&](const Kernels& kernels) {
    for (const Dtype dtype : kDtypes)
      for (const std::int64_t dim : {1, 3, 64, 101}) {
        test_dots(kernels, dtype, dim, report);
        test_sums(kernels, dtype, kDtypes[dim % 3], dim % 2 == 0, dim, report);
        test_sums(kernels, dtype, dtype, dim % 2 == 1, dim, report);
      }
  });
}

void test_row_entropies(Report& report) {
  for_each_set([&](const Kernels& kernels) {
    for (const Dtype dtype : kDtypes)
      for (const std::int64_t vocabulary : {1, 2, 63, 65, 4097, 40001})
        for (const bool tempered : {false, true})
          test_entropies(kernels, dtype, vocabulary, tempered, report);
  });
}
