#include "truth.h"

#include <algorithm>

namespace {

constexpr double kUnit = 0x1p-24;     // half a unit in the last place of 1
constexpr double kVanishing = 1e-35;  // smaller numbers may be flushed or clamped

// How many additions a term of a sum of n may pass through, with a few to spare.
double additions(std::int64_t n) { return double(std::min<std::int64_t>(n, 256) + n / 128 + 8); }

double shortened(double x) {
  int exponent;
  std::frexp(x, &exponent);
  const double step = std::ldexp(1.0, exponent - 11);
  return std::nearbyint(x / step) * step;
}

// The logits of one token, and how far a kernel's may be off.
struct Row {
  std::vector<double> z, off, slope, slope_off;
  double temperature;
  std::int64_t target, top, columns;

  // The sums of running_sums.h and statistics.h, relative to the largest logit and without it.
  double s = 0, t = 0, u = 0, s2 = 0, t2 = 0;
  double s_off = 0, t_off = 0, u_off = 0, s2_off = 0, t2_off = 0;

  Row(const Problem& p, const Logits& logits, Precision precision, std::int64_t r, Fault fault)
      : temperature(p.temperature.empty() ? 1 : p.temperature[p.index[r]]),
        target(p.target[p.index[r]]),
        columns(fault == Fault::column_missing ? p.vocabulary - 1 : p.vocabulary) {
    for (std::int64_t j = 0; j < p.vocabulary; ++j) {
      const double x = logits.value[r * p.vocabulary + j];
      const double size = logits.magnitude[r * p.vocabulary + j];
      const double error = additions(p.dim) * precision.product * size + kVanishing;
      const double u = p.softcap > 0 ? std::tanh(x / p.softcap) : 0;
      const double u_off = p.softcap > 0 ? (1 - u * u) * error / p.softcap + 4 * kUnit : 0;
      z.push_back(p.softcap > 0 ? p.softcap * u : x);
      off.push_back(p.softcap > 0 ? p.softcap * u_off + 4 * kUnit * std::fabs(z[j]) : error);
      if (std::isinf(x)) off[j] = 0;
      slope.push_back(1 - u * u);
      slope_off.push_back(p.softcap > 0 ? 2 * u_off + 2 * kUnit : 0);
    }
    top = std::max_element(z.begin(), z.begin() + columns) - z.begin();
    sum();
  }

  double distance(std::int64_t j) const { return (z[j] - z[top]) / temperature; }

  double distance_off(std::int64_t j) const {
    return j == top ? 0 : (off[j] + off[top]) / temperature + 3 * kUnit * std::fabs(distance(j));
  }

  void sum() {
    for (std::int64_t j = 0; j < columns; ++j) {
      if (j == top || std::isinf(z[j])) continue;
      const double d = distance(j), e = std::exp(d), moved = distance_off(j);
      const double here = moved + 136 * kUnit;  // exp, and fp32 sums of at most 128 terms
      s += e, t += e * d, u += e * d * d, s2 += e * e, t2 += e * e * d;
      s_off += e * here;
      t_off += e * (std::fabs(d) * here + moved);
      u_off += e * (d * d * here + 2 * std::fabs(d) * moved);
      s2_off += e * e * 2 * here;
      t2_off += e * e * (2 * std::fabs(d) * here + moved);
    }
    s_off += kVanishing * double(columns), t_off += 100 * kVanishing * double(columns);
  }

  double whole() const { return 1 + s; }
  double log_sum() const { return std::log1p(s); }
  double log_sum_off() const { return s_off / whole() + kUnit * log_sum(); }
  double entropy() const { return log_sum() - t / whole(); }

  double entropy_off() const {
    const double z = whole();
    return s_off * (1 / z + std::fabs(t) / (z * z)) + t_off / z + 2 * kUnit * entropy();
  }

  double logp(std::int64_t j) const { return distance(j) - log_sum(); }

  double logp_off(std::int64_t j) const {
    return distance_off(j) + log_sum_off() +
           2 * kUnit * (std::fabs(distance(j)) + log_sum() + std::fabs(logp(j)));
  }
};

// The mean of all logits, and whether the target's is the first of the largest, where that is
// clear.
void compare_logits(const Row& row, const Problem& p, const Outcome& got, std::int64_t token,
                    const std::string& what, Report& report) {
  double total = 0, total_off = 0;
  bool clear = true;
  for (std::int64_t j = 0; j < row.columns; ++j) {
    total += row.z[j];
    total_off += row.off[j] + 136 * kUnit * std::fabs(row.z[j]);
    const std::int64_t other = row.target == row.top ? j : row.target;
    if (other != row.top && row.z[row.top] - row.z[other] <= row.off[row.top] + row.off[other])
      clear = false;
  }
  const float mean = got.statistics[4 * p.tokens + token];
  const double scale = double(p.vocabulary) * row.temperature;
  if (std::isinf(total))
    report.require(mean == float(total), what + " mean logit of -inf");
  else
    report.close(mean, total / scale, total_off / scale + 2 * kUnit * std::fabs(total / scale),
                 what + " mean logit", token);
  const float first = got.statistics[5 * p.tokens + token];
  if (clear) report.require(first == float(row.target == row.top), what + " is_top1");
}

void compare_outputs(const Row& row, const Problem& p, const Outcome& got, std::int64_t token,
                     const std::string& what, Report& report) {
  const double z = row.whole(), max = row.z[row.top] / row.temperature;
  const auto check = [&](int i, double want, double off, const char* name) {
    report.close(got.rows[i * p.tokens + token], want, off + 2 * kUnit * std::fabs(want),
                 what + name, token);
  };
  check(0, row.logp(row.target), row.logp_off(row.target), " logprob");
  check(1, row.entropy(), row.entropy_off(), " entropy");
  check(2, max + row.log_sum(), row.off[row.top] / row.temperature + row.log_sum_off(),
        " logsumexp");
  check(3, row.z[row.top], row.off[row.top], " max");
  check(4, row.log_sum(), row.log_sum_off(), " log_sum");

  const auto statistic = [&](int i, double want, double off, const char* name) {
    report.close(got.statistics[i * p.tokens + token], want,
                 off + 4 * kUnit * std::fabs(want) + kVanishing, what + name, token);
  };
  const double mean = row.t / z, mean_off = row.t_off / z + std::fabs(mean) * row.s_off / z;
  const double squares = 1 + row.s2, log_sum = row.log_sum();
  const double weighted = row.t2 - log_sum * squares;
  statistic(0, row.u / z - mean * mean,
            (row.u_off + row.u * row.s_off / z) / z + 2 * std::fabs(mean) * mean_off,
            " varentropy");
  statistic(1, 1 / z, row.s_off / (z * z), " largest p");
  statistic(2, squares / (z * z), (row.s2_off + 2 * squares * row.s_off / z) / (z * z), " sum p^2");
  statistic(3, weighted / (z * z),
            (row.t2_off + log_sum * row.s2_off + squares * row.s_off / z +
             2 * std::fabs(weighted) * row.s_off / z) /
                (z * z),
            " sum p^2 log p");
  compare_logits(row, p, got, token, what, report);
}

struct Derivative {
  double value, off;
};

// dz of column j, and how far a kernel's may be off.
Derivative differentiate(const Row& row, const Problem& p, std::int64_t r, std::int64_t j,
                         Precision precision, Fault fault) {
  if (std::isinf(row.z[j]) || j >= row.columns) return {0, kVanishing};
  const auto given = [&](const std::vector<float>& g) { return g.empty() ? 0.0 : double(g[r]); };
  const double g = given(p.grad_logprob), by_entropy = given(p.grad_entropy);
  const double by_sum = given(p.grad_logsumexp), h = row.entropy();
  const double logp = row.logp(j), off = row.logp_off(j), prob = std::exp(logp);
  const double rest = by_sum - by_entropy * (h + logp);
  const bool hit = j == row.target;
  double value = prob * rest - (hit ? g * std::expm1(logp) : g * prob);
  const double terms =
      std::fabs(by_sum) + std::fabs(by_entropy) * (h + std::fabs(logp)) + std::fabs(g);
  double error = prob * (off + 4 * kUnit) * (std::fabs(rest) + std::fabs(g)) +
                 prob * std::fabs(by_entropy) * (off + row.entropy_off()) +
                 6 * kUnit * prob * terms;
  if (hit) error -= 4 * kUnit * std::fabs(g) * std::expm1(logp);
  value /= row.temperature, error /= row.temperature;
  error = error * row.slope[j] + std::fabs(value) * (row.slope_off[j] + 2 * kUnit);
  value *= row.slope[j];
  if (fault == Fault::rounded_dz) value = rounded(float(value), Dtype::bf16);
  return {value, error + precision.dz * std::fabs(value) + kVanishing};
}

// A sum of products dz x, and how far a kernel's may be off.
struct Sum {
  double value = 0, off = 0, magnitude = 0;

  void add(Derivative dz, double x) {
    value += dz.value * x;
    off += dz.off * std::fabs(x);
    magnitude += std::fabs(dz.value * x);
  }

  double bound(std::int64_t n, Precision precision) const {
    return off + additions(n) * precision.product * magnitude + kVanishing * double(n);
  }
};

void compare_gradients(const Problem& p, const std::vector<Derivative>& dz, Precision precision,
                       const Outcome& got, const std::string& what, Report& report, Fault fault) {
  const std::int64_t rows = std::int64_t(p.index.size());
  const double last_bit = p.dtype == Dtype::bf16 ? 0x1p-8 : p.dtype == Dtype::f16 ? 0x1p-11 : 0;
  const double subnormal = p.dtype == Dtype::f16 ? 0x1p-25 : 0;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t d = 0; d < p.dim; ++d) {
      Sum sum;
      for (std::int64_t j = 0; j < p.vocabulary; ++j)
        sum.add(dz[r * p.vocabulary + j], p.weight[j * p.dim + d]);
      report.close(got.dhidden[r * p.dim + d], sum.value, sum.bound(p.vocabulary, precision),
                   what + " dhidden", r * p.dim + d);
    }
  for (std::int64_t j = 0; j < p.vocabulary; ++j) {
    Sum bias;
    for (std::int64_t r = 0; r < rows; ++r) bias.add(dz[r * p.vocabulary + j], 1);
    // The kernels sum dz before they round it for the products.
    report.close(got.dbias[j], bias.value, bias.bound(rows, {kUnit, 0}), what + " dbias", j);
    for (std::int64_t d = 0; d < p.dim; ++d) {
      Sum sum;
      for (std::int64_t r = 0; r < rows - (fault == Fault::token_missing); ++r)
        sum.add(dz[r * p.vocabulary + j], p.hidden[p.index[r] * p.dim + d]);
      const double bound = sum.bound(rows, precision);
      report.close(got.dweight[j * p.dim + d], sum.value,
                   bound + last_bit * (std::fabs(sum.value) + bound) + subnormal, what + " dweight",
                   j * p.dim + d);
    }
  }
}

}  // namespace

Precision precision_of(const std::string& isa, Dtype dtype) {
  if (dtype != Dtype::bf16 || (isa.find("_bf16") == std::string::npos && isa != "amx"))
    return {kUnit, 0};
  // BFDOT rounds to odd: up to a whole unit in the last place.
  return {isa == "neon_bf16" ? 2 * kUnit : kUnit, 0x1p-8};
}

Logits::Logits(const Problem& p, Fault fault) {
  for (const std::int64_t token : p.index)
    for (std::int64_t j = 0; j < p.vocabulary; ++j) {
      double sum = p.bias.empty() ? 0 : p.bias[j], size = std::fabs(sum);
      for (std::int64_t d = 0; d < p.dim; ++d) {
        double w = p.weight[j * p.dim + d];
        if (fault == Fault::short_operands) w = shortened(w);
        sum += double(p.hidden[token * p.dim + d]) * w;
        size += std::fabs(p.hidden[token * p.dim + d] * w);
      }
      value.push_back(fault == Fault::short_logits ? shortened(sum) : sum);
      magnitude.push_back(std::isinf(sum) ? 0 : size);
    }
}

void compare(const Problem& p, const Logits& logits, Precision precision, const Outcome& got,
             const std::string& what, Report& report, Fault fault) {
  std::vector<Derivative> dz;
  for (std::int64_t r = 0; r < std::int64_t(p.index.size()); ++r) {
    const Row row(p, logits, precision, r, fault);
    compare_outputs(row, p, got, p.index[r], what, report);
    for (std::int64_t j = 0; j < p.vocabulary; ++j)
      dz.push_back(differentiate(row, p, r, j, precision, fault));
  }
  compare_gradients(p, dz, precision, got, what, report, fault);
}
