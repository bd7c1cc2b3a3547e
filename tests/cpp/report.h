// Counts checks and prints the failed ones. Errors are measured in units of their bounds.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

struct Report {
  long checks = 0, failures = 0;
  double worst = 0;  // the largest error, as a fraction of its bound
  bool silent = false;

  void require(bool holds, const std::string& what) {
    ++checks;
    if (holds) return;
    if (!silent && failures < 20) std::printf("FAILED: %s\n", what.c_str());
    ++failures;
  }

  // Checks one value of many; `what` is the name of all, `i` the place of this one.
  void close(double got, double want, double bound, const std::string& what, long i) {
    const double error = std::fabs(got - want);
    if (error <= bound) {
      ++checks;
      if (bound > 0) worst = std::fmax(worst, error / bound);
      return;
    }
    char numbers[160];
    std::snprintf(numbers, sizeof numbers, "[%ld]: got %.9g, want %.9g within %.3g", i, got, want,
                  bound);
    require(false, what + numbers);
  }
};
