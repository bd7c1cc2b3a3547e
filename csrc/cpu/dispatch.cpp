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

}  // namespace entropy_kernels
