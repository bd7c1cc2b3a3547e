#include <algorithm>
#include <cstring>

#include "head.h"

// The namespaces that kernels.cpp is compiled into.
namespace avx512_bf16 {
extern const entropy_kernels::Kernels kernels;
}
namespace avx512 {
extern const entropy_kernels::Kernels kernels;
}
namespace avx2 {
extern const entropy_kernels::Kernels kernels;
}
namespace portable {
extern const entropy_kernels::Kernels kernels;
}

namespace entropy_kernels {

namespace {

struct Entry {
  const Kernels* kernels;
  bool usable;
};

#ifdef EK_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The fastest of many short runs counts: a busy machine decides the same way every time.
double seconds(const Kernels& kernels, Dtype dtype) {
  double best = kernels.seconds(dtype);
  for (int run = 1; run < 32; ++run) best = std::min(best, kernels.seconds(dtype));
  return best;
}

// The best set, unless products of pairs of bf16 are the slower instruction there: Intel's Sapphire
// Rapids runs vdpbf16ps at half the rate of fp32 FMA, AMD's Zen 4 and 5 at twice that rate. The
// margin lies between the two.
const Kernels* measure_bf16() {
  const Kernels* best = usable_kernels(0);
  double least = seconds(*best, Dtype::bf16);
  for (int i = 1; const Kernels* other = usable_kernels(i); ++i) {
    const double here = seconds(*other, Dtype::bf16);
    if (here < 0.8 * least) best = other, least = here;
  }
  return best;
}

}  // namespace

const Kernels* usable_kernels(int i) {
  static const Entry entries[] = {
#ifdef EK_X86
      {&avx512_bf16::kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {&avx512::kernels, has_avx512()},
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&portable::kernels, true},
  };
  for (const Entry& entry : entries)
    if (entry.usable && i-- == 0) return entry.kernels;
  return nullptr;
}

const Kernels* find_kernels(const char* name) {
  for (int i = 0; const Kernels* kernels = usable_kernels(i); ++i)
    if (std::strcmp(name, kernels->name) == 0) return kernels;
  return nullptr;
}

const Kernels* fastest_kernels(Dtype dtype) {
  if (dtype != Dtype::bf16) return usable_kernels(0);
  static const Kernels* const best = measure_bf16();
  return best;
}

}  // namespace entropy_kernels
