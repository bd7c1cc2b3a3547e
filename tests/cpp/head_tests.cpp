#include <limits>

#include "tests.h"
#include "truth.h"

namespace {

constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Case {
  std::int64_t tokens, dim, vocabulary;
  Options options;
};

Options everything() {
  Options options;
  options.bias = options.temperature = options.some_rows = true;
  options.softcap = 12;
  return options;
}

Options logprob_alone() {
  Options options;
  options.entropy = options.logsumexp = false;
  return options;
}

// Odd D (half a pair), partial tiles of every kind, several chunks of rows, long sums.
const Case kCases[] = {
    {1, 1, 1, {}},
    {5, 65, 385, {}},
    {67, 40, 389, everything()},
    {66, 37, 200, {}},
    {700, 9, 99, everything()},
    {3, 600, 97, everything()},
    {130, 16, 300, logprob_alone()},
};

std::string label(const Kernels& kernels, const Problem& p) {
  const std::string shape =
      std::to_string(p.tokens) + "x" + std::to_string(p.dim) + "x" + std::to_string(p.vocabulary);
  return std::string(kernels.name) + " " + shape + " " + name_of(p.dtype);
}

bool is_nan(float x) { return x != x; }

// Calls check(value, i) for all that forward writes of one token.
template <class Check>
void each_output(const Outcome& out, std::int64_t tokens, std::int64_t token, Check check) {
  for (int i = 0; i < 5; ++i) check(out.rows[i * tokens + token], i);
  for (int i = 0; i < 6; ++i) check(out.statistics[i * tokens + token], 5 + i);
}

void require_untouched(const Problem& p, const Outcome& got, const std::string& what,
                       Report& report) {
  std::vector<bool> touched(p.tokens);
  for (const std::int64_t token : p.index) touched[token] = true;
  for (std::int64_t t = 0; t < p.tokens; ++t)
    if (!touched[t])
      each_output(got, p.tokens, t, [&](float x, int) {
        report.require(x == kUntouched, what + ": rows that are not asked for stay untouched");
      });
}

// Requires that token 66, and no other, has a gradient of NaN.
void require_one_token(const Problem& p, const Outcome& got, const Outcome& clean,
                       const std::string& what, Report& report) {
  for (std::int64_t k = 0; k < p.tokens * p.dim; ++k) {
    const float x = got.dhidden[k];
    report.require(k / p.dim == 66 ? is_nan(x) : x == clean.dhidden[k],
                   what + " is in one token's gradient");
  }
}

}  // namespace

void test_values(Dtype dtype, Report& report) {
  for (const Case& one : kCases) {
    const Problem problem(one.tokens, one.dim, one.vocabulary, dtype, one.options);
    const Logits logits(problem);
    const std::int64_t unit = std::int64_t(problem.index.size()) * one.dim * one.vocabulary;
    for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i) {
      const std::string what = label(*kernels, problem);
      const Outcome got = run(*kernels, problem, 2, false);
      compare(problem, logits, precision_of(kernels->name, dtype), got, what, report);
      require_untouched(problem, got, what, report);
      report.require(got.forward_products == unit, what + ": forward counts its products");
      report.require(got.backward_products == 3 * unit, what + ": backward counts its products");
    }
  }
}

void test_bounds(Report& report) {
  for (const Dtype dtype : kDtypes) {
    std::vector<Fault> faults = {Fault::short_logits, Fault::column_missing, Fault::token_missing};
    // 16-bit operands have no bits to lose, and dz of bf16 inputs may be rounded.
    if (dtype == Dtype::f32) {
      faults.push_back(Fault::short_operands);
      faults.push_back(Fault::rounded_dz);
    }
    const Problem problem(67, 40, 200, dtype, everything());
    for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i) {
      const Outcome got = run(*kernels, problem, 2, false);
      for (const Fault fault : faults) {
        Report seen;
        seen.silent = true;
        compare(problem, Logits(problem, fault), precision_of(kernels->name, dtype), got, "", seen,
                fault);
        report.require(seen.failures > 0, label(*kernels, problem) + ": the bounds let fault " +
                                              std::to_string(int(fault)) + " pass");
      }
    }
  }
}

void test_same_bits(Report& report) {
  for (const Dtype dtype : kDtypes)
    for (const bool some_rows : {false, true}) {
      Options options = everything();
      options.some_rows = some_rows;
      const Problem problem(150, 17, 701, dtype, options);
      for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i) {
        const std::string what = label(*kernels, problem);
        const Outcome one = run(*kernels, problem, 1, false);
        for (const int threads : {1, 2, 3}) {
          const Outcome got = run(*kernels, problem, threads, false);
          report.require(got == run(*kernels, problem, threads, false),
                         what + ": the same bits twice");
          for (std::size_t k = 0; k < got.rows.size(); ++k)
            report.close(got.rows[k], one.rows[k], 1e-5 * std::fabs(one.rows[k]),
                         what + ": another number of threads", long(k));
        }
        const Outcome stored = run(*kernels, problem, 2, true);
        const Outcome again = run(*kernels, problem, 2, false);
        report.require(stored.same_gradients(again), what + ": stored logits give the same bits");
        report.require(stored.backward_products < again.backward_products,
                       what + ": stored logits are read");
      }
    }
}

// A NaN in a hidden state reaches every output of its token, and no other token.
void test_poisoned_token(Report& report) {
  for (const Dtype dtype : kDtypes)
    for (const float poison : {kNan, kInfinity, -kInfinity}) {
      Problem problem(70, 9, 200, dtype, {});
      for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i) {
        const std::string what = label(*kernels, problem) + ": a poisoned token";
        const Outcome clean = run(*kernels, problem, 2, false);
        Problem sick = problem;
        sick.hidden[66 * sick.dim + 4] = poison;
        const Outcome got = run(*kernels, sick, 2, false);
        each_output(got, 70, 66, [&](float x, int k) {
          report.require(is_nan(x) || k == 3, what + " has NaN statistics");
        });
        for (std::int64_t t = 0; t < 70; ++t)
          for (int k = 0; k < 5 && t != 66; ++k)
            report.require(got.rows[k * 70 + t] == clean.rows[k * 70 + t],
                           what + " leaves others alone");
        require_one_token(sick, got, clean, what, report);
        for (const float x : got.dweight) report.require(is_nan(x), what + " is in all of dweight");
        for (const float x : got.dbias) report.require(is_nan(x), what + " is in all of dbias");
      }
    }
}

// A NaN in one row of the weight or the bias reaches every token. -inf in the bias removes a
// column.
void test_poisoned_column(Report& report) {
  for (const Dtype dtype : kDtypes) {
    Options options;
    options.bias = true;
    const Problem problem(70, 9, 200, dtype, options);
    for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i) {
      const std::string what = label(*kernels, problem) + ": a poisoned column";
      for (const bool in_weight : {true, false}) {
        Problem sick = problem;
        (in_weight ? sick.weight[197 * sick.dim + 8] : sick.bias[5]) = kNan;
        const Outcome got = run(*kernels, sick, 2, false);
        for (std::int64_t t = 0; t < 70; ++t)
          each_output(got, 70, t, [&](float x, int) {
            report.require(is_nan(x), what + " is in every token");
          });
        for (const float x : got.dhidden) report.require(is_nan(x), what + " is in all of dhidden");
      }
      Problem masked = problem;
      masked.bias[3] = masked.bias[130] = -kInfinity;
      for (std::int64_t& target : masked.target)
        if (target == 3 || target == 130) target = 4;
      compare(masked, Logits(masked), precision_of(kernels->name, dtype),
              run(*kernels, masked, 2, false), what + " of -inf", report);
      masked.bias.assign(200, -kInfinity);
      for (const float x : run(*kernels, masked, 2, false).rows)
        report.require(is_nan(x), what + "s throughout leave no distribution");
    }
  }
}

// A NaN that arrives as a gradient reaches its token's gradient, and all of the weight's.
void test_poisoned_gradient(Report& report) {
  for (const Dtype dtype : kDtypes) {
    const Problem problem(70, 9, 200, dtype, {});
    for (int i = 0; const Kernels* kernels = entropy_kernels::usable_kernels(i); ++i) {
      const std::string what = label(*kernels, problem) + ": a NaN gradient";
      const Outcome clean = run(*kernels, problem, 2, false);
      for (int which = 0; which < 3; ++which) {
        Problem sick = problem;
        std::vector<float>* const grads[] = {&sick.grad_logprob, &sick.grad_entropy,
                                             &sick.grad_logsumexp};
        (*grads[which])[66] = kNan;
        const Outcome got = run(*kernels, sick, 2, false);
        require_one_token(sick, got, clean, what, report);
        for (const float x : got.dweight) report.require(is_nan(x), what + " is in all of dweight");
      }
    }
  }
}
