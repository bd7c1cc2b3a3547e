// Tests of csrc/cpu without Python and torch, for every instruction set that the machine can run.
// Arguments name sets that must be usable. Prints a line per test; the status is 1 if one fails.
#include <cstdio>

#include "head.h"
#include "tests.h"

template <entropy_kernels::Dtype kDtype>
static void values(Report& report) {
  test_values(kDtype, report);
}

int main(int count, char** names) {
  std::printf("instruction sets:");
  for (int i = 0; const auto* kernels = entropy_kernels::usable_kernels(i); ++i)
    std::printf(" %s", kernels->name);
  std::printf("\n");
  for (int i = 1; i < count; ++i)
    if (entropy_kernels::find_kernels(names[i]) == nullptr) {
      std::printf("FAILED: this machine cannot run %s\n", names[i]);
      return 1;
    }
  const struct {
    const char* name;
    void (*run)(Report&);
  } tests[] = {
      {"values, fp32", values<entropy_kernels::Dtype::f32>},
      {"values, bf16", values<entropy_kernels::Dtype::bf16>},
      {"values, fp16", values<entropy_kernels::Dtype::f16>},
      {"bounds", test_bounds},
      {"same bits", test_same_bits},
      {"poisoned token", test_poisoned_token},
      {"poisoned column", test_poisoned_column},
      {"poisoned gradient", test_poisoned_gradient},
      {"radix histogram", test_radix_histogram},
      {"ratio loss", test_ratio_loss},
      {"pair products", test_pair_products},
      {"row entropies", test_row_entropies},
  };
  bool failed = false;
  for (const auto& test : tests) {
    Report report;
    test.run(report);
    std::printf("%s: %ld checks, %ld failed, worst error %.2f of its bound\n", test.name,
                report.checks, report.failures, report.worst);
    std::fflush(stdout);
    failed = failed || report.failures > 0 || report.checks == 0;
  }
  return failed ? 1 : 0;
}
