// The selection's kernels against a stable sort: a program, with arguments for the fewest and the
// most values of a case and for the seeds of its schedules, and the library that test_selection.py
// calls.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

#include "selection.cu"

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kGuard = -77;

struct Share {
  int64_t of, in;  // of / in
  double exact() const { return double(of) / double(in) * (1 - std::ldexp(1.0, -48)); }
  int64_t count(int64_t n) const {
    return n == 0 ? 0 : std::max<int64_t>(1, (n * of + in - 1) / in);
  }
};

struct Case {
  char const* kind;
  std::vector<float> value;
  std::vector<uint8_t> mask;  // empty: all are valid
  Share share;
  // Elements before the first of value, mask and selected, so that it lies at no round address.
  size_t skew_value, skew_mask, skew_selected;
};

// What the sort says.
struct Truth {
  std::vector<uint8_t> selected;
  std::vector<int> rows;
  float threshold = kInf;
  int64_t quota = 0, equal = 0;
};

bool below(float a, float b) { return a != a ? false : b != b ? true : a < b; }

Truth truth_of(Case const& of) {
  int const n = int(of.value.size());
  std::vector<int> order;
  for (int i = 0; i < n; ++i)
    if (of.mask.empty() || of.mask[i]) order.push_back(i);
  int64_t const k = of.share.count(int64_t(order.size()));
  auto const value = [&](int i) { return of.value[i]; };
  std::vector<int> const valid = order;
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return below(value(b), value(a)); });
  Truth truth;
  truth.selected.assign(n, 0);
  truth.rows.assign(order.begin(), order.begin() + k);
  std::sort(truth.rows.begin(), truth.rows.end());
  if (k > 0) truth.threshold = value(order[k - 1]);
  auto const ties = [&](int i) {
    return !below(value(i), truth.threshold) && !below(truth.threshold, value(i));
  };
  for (int i : truth.rows) truth.selected[i] = 1, truth.quota += ties(i);
  if (k > 0) truth.equal = std::count_if(valid.begin(), valid.end(), ties);
  return truth;
}

int failures = 0;

void expect(bool right, Case const& of, char const* what) {
  if (right) return;
  if (++failures < 10)
    std::printf("%s, %zu values, %lld / %lld, seed %u: wrong %s\n", of.kind, of.value.size(),
                static_cast<long long>(of.share.of), static_cast<long long>(of.share.in),
                simt::seed, what);
}

// The bits but for those of a NaN and the sign of zero, which the kernels make one.
bool same(float got, float wanted) {
  if (wanted != wanted) return got != got;
  return got == wanted && (got != 0.0f || !std::signbit(got));
}

// Copies at an address of the case's skew, at the end of its memory.
template <class T>
struct Skewed {
  std::vector<T> all;
  size_t skew;
  Skewed(std::vector<T> const& from, size_t before) : all(before + from.size()), skew(before) {
    std::copy(from.begin(), from.end(), all.begin() + before);
  }
  T* data() { return all.data() + skew; }
};

void run_top(Case const& of, ek::Values const& values, Truth const& truth, bool rows_too) {
  size_t const n = of.value.size();
  float threshold = 0.0f;
  int64_t quota = kGuard, equal = kGuard;
  int number = int(kGuard);
  std::vector<int> rows(2 * n + 64, int(kGuard));  // room for rows that nobody asked for
  Skewed<uint8_t> selected(std::vector<uint8_t>(n, 9), of.skew_selected);
  ek::top(values, of.share.exact(),
          {&threshold, &quota, &equal, selected.data(), rows_too ? rows.data() : nullptr,
           rows_too ? &number : nullptr},
          nullptr);
  expect(same(threshold, truth.threshold), of, "threshold of top");
  expect(quota == truth.quota, of, "quota of top");
  expect(equal == truth.equal, of, "ties of top");
  expect(std::equal(truth.selected.begin(), truth.selected.end(), selected.data()), of,
         "mask of top");
  if (!rows_too) return;
  expect(number == int(truth.rows.size()), of, "number of top");
  expect(std::equal(truth.rows.begin(), truth.rows.end(), rows.begin()), of, "rows of top");
  expect(std::count(rows.begin(), rows.end(), int(kGuard)) == int(rows.size() - truth.rows.size()),
         of, "rows beyond the number");
}

int64_t key_of(float x) {
  auto const bits = simt::bits_as<int32_t>(x);
  if (x != x) return 0xffffffffll;
  return (int64_t{1} << 31) + (bits < 0 ? -(x == 0.0f ? 0 : 1) - (bits & 0x7fffffff) : bits);
}

void run_digits(Case const& of, ek::Values const& values, Truth const& truth) {
  int64_t prefix = 0, remaining = 0, equal = 0;
  float threshold = 0.0f;
  for (int known = 0, bits; known < 32; known += bits) {
    bits = std::min(ek::kBits, 32 - known);
    int const shift = 32 - known - bits;
    std::vector<int64_t> counts(size_t{1} << bits, 0);
    ek::radix_histogram(values, &prefix, shift, bits, known, counts.data(), nullptr);
    ek::radix_pick(counts.data(), counts.data(), &prefix, known ? &remaining : nullptr,
                   of.share.exact(), shift, bits, &prefix, &remaining, &equal, &threshold, nullptr);
  }
  expect(same(threshold, truth.threshold), of, "threshold of the digits");
  expect(remaining == truth.quota && equal == truth.equal, of, "quota of the digits");
  std::vector<int64_t> counts(ek::kSelectBlocks, kGuard);
  Skewed<uint8_t> selected(std::vector<uint8_t>(of.value.size(), 9), of.skew_selected);
  ek::select_largest(values, &threshold, &remaining, counts.data(), selected.data(), nullptr);
  expect(std::equal(truth.selected.begin(), truth.selected.end(), selected.data()), of,
         "mask of select_largest");
  std::vector<int64_t> wide(1 << 19, 0), wanted(1 << 19, 0);
  for (size_t i = 0; i < of.value.size(); ++i)
    if (of.mask.empty() || of.mask[i]) ++wanted[key_of(of.value[i]) >> 13];
  prefix = 0;
  ek::radix_histogram(values, &prefix, 13, 19, 0, wide.data(), nullptr);
  expect(wide == wanted, of, "histogram of 19 bits");
}

std::vector<float> values_of(std::string const& kind, int n, std::mt19937& random) {
  static constexpr float kEdges[] = {-kInf,  -1.5f, -1e-45f, -0.0f, 0.0f,
                                     1e-45f, 3.0f,  kInf,    kNan,  -kNan};
  std::gamma_distribution<float> gamma(0.3f, 1.0f);
  std::vector<float> value(n);
  for (float& x : value) {
    x = gamma(random);
    if (kind == "tied") x = std::round(10.0f * x) / 10.0f;
    if (kind == "equal") x = 0.25f;
    if (kind == "edges") x = kEdges[random() % 10];
    if (kind == "signed") x = random() % 2 ? -x : x;
    if (kind == "close") x = simt::bits_as<float>(0x3f800000u + random() % 1000);
  }
  return value;
}

template <class Call>
void expect_refusal(std::string const& text, Call call) {
  try {
    call();
  } catch (std::runtime_error const& error) {
    if (error.what() == text) return;
  }
  ++failures;
  std::printf("no refusal that says: %s\n", text.c_str());
}

// What is refused before anything is read.
void refusals() {
  expect_refusal("top takes at most 131072 values; got 131073",
                 [] { ek::top({nullptr, nullptr, ek::kOneBlock + 1}, 1.0, {}, nullptr); });
  expect_refusal("radix_pick takes 1 to " + std::to_string(ek::kBits) + " bits; got 12", [] {
    ek::radix_pick(nullptr, nullptr, nullptr, nullptr, 1.0, 0, 12, nullptr, nullptr, nullptr,
                   nullptr, nullptr);
  });
}

}  // namespace

int main(int arguments, char** argument) {
  std::vector<std::pair<char const*, int>> const sizes = {
      {"edges", 0},    {"edges", 1},      {"signed", 31},  {"tied", 128},
      {"edges", 257},  {"close", 4096},   {"tied", 4097},  {"equal", 5003},
      {"edges", 9001}, {"signed", 12289}, {"tied", 33001}, {"tied", 600002},
  };
  refusals();
  int const fewest = std::atoi(argument[1]), most = std::atoi(argument[2]);
  for (int a = 3; a < arguments; ++a) {
    simt::seed = unsigned(std::atoi(argument[a]));
    simt::preempt = simt::seed % 2;
    std::mt19937 random(simt::seed);
    Share const shares[] = {{1, 5}, {55, 100}, {1, 1}, {1, 1000000000}};
    for (auto const& [kind, n] : sizes) {
      if (n < fewest || n > most) continue;
      Case of{kind,         values_of(kind, n, random),
              {},           shares[random() % 4],
              random() % 3, random() % 3,
              random() % 3};
      for (int masked = 0; masked < 3; ++masked) {
        of.mask.assign(masked ? n : 0, 0);
        if (masked == 1)
          for (uint8_t& valid : of.mask) valid = random() % 5 ? 1 + random() % 2 * 254 : 0;
        if (masked == 2 && n > 300) continue;  // nothing is valid
        Truth const truth = truth_of(of);
        Skewed<float> value(of.value, of.skew_value);
        Skewed<uint8_t> mask(of.mask, of.skew_mask);
        ek::Values const values{value.data(), of.mask.empty() ? nullptr : mask.data(), n};
        bool const rows_too = random() % 2;
        if (n <= ek::kOneBlock) run_top(of, values, truth, rows_too);
        run_digits(of, values, truth);
      }
    }
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}

extern "C" {

void schedule(unsigned seed, bool preempt) { simt::seed = seed, simt::preempt = preempt; }

void top(float const* value, uint8_t const* mask, int64_t n, double share, float* threshold,
         int64_t* quota, int64_t* equal, uint8_t* selected, int* rows, int* number) {
  ek::top({value, mask, n}, share, {threshold, quota, equal, selected, rows, number}, nullptr);
}
void radix_histogram(float const* value, uint8_t const* mask, int64_t n, int64_t const* prefix,
                     int shift, int bits, int prefix_bits, int64_t* counts) {
  ek::radix_histogram({value, mask, n}, prefix, shift, bits, prefix_bits, counts, nullptr);
}
void radix_pick(int64_t const* counts, int64_t const* local, int64_t const* prefix,
                int64_t const* remaining, double share, int shift, int bits, int64_t* new_prefix,
                int64_t* new_remaining, int64_t* equal, float* value) {
  ek::radix_pick(counts, local, prefix, remaining, share, shift, bits, new_prefix, new_remaining,
                 equal, value, nullptr);
}
void select_largest(float const* value, uint8_t const* mask, int64_t n, float const* threshold,
                    int64_t const* quota, uint8_t* selected) {
  int64_t counts[ek::kSelectBlocks];
  ek::select_largest({value, mask, n}, threshold, quota, counts, selected, nullptr);
}
}
