// Which of the compiled instruction sets this machine can run.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "amx.h"
#include "head.h"

#ifdef EK_X86
#include <cpuid.h>
#endif
#if defined(EK_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(EK_AARCH64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// kernels_per_isa.cpp is compiled into these namespaces.
#define DECLARE_KERNELS(isa)                     \
  namespace isa {                                \
  extern const entropy_kernels::Kernels kernels; \
  }
DECLARE_KERNELS(amx)
DECLARE_KERNELS(amx_model)
DECLARE_KERNELS(avx512_bf16)
DECLARE_KERNELS(avx512)
DECLARE_KERNELS(avx2)
DECLARE_KERNELS(neon_bf16)
DECLARE_KERNELS(neon)
DECLARE_KERNELS(portable)

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

// Whether EK_CPU_ISA names a set without tiles; then the system is not asked for them.
bool environment_names_another() {
  const char* named = std::getenv("EK_CPU_ISA");
  if (named == nullptr) return false;
  for (const Kernels* kernels : {&amx_model::kernels, &avx512_bf16::kernels, &avx512::kernels,
                                 &avx2::kernels, &portable::kernels})
    if (std::strcmp(named, kernels->name) == 0) return true;
  return false;
}

// AVX2, FMA and F16C. Clang's builtin has no name for F16C.
bool has_avx2() {
  constexpr unsigned f16c = 1u << 29;
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) && (c & f16c);
}
#endif

#ifdef EK_AARCH64
// Whether it has BFDOT and BFCVT. Every processor of this architecture has the rest of NEON.
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which is not in older headers
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

// why_no_amx, computed.
const char* ask_for_amx() {
#if !defined(EK_X86)
  return nullptr;
#else
  if (!processor_has_amx()) return nullptr;
  if (environment_names_another()) return "EK_CPU_ISA names another instruction set";
#if !defined(EK_AMX)
  return "the compiler that built the extension does not know its instructions";
#else
  if (!has_avx512()) return "AVX-512 is off";
  const char* refused = request_amx();
  if (*refused != 0) return refused;
  return amx::kernels.agrees() ? "" : "its products differ from those of AVX-512";
#endif
#endif
}

#ifdef EK_AMX
bool amx_is_usable() { return why_no_amx() != nullptr && *why_no_amx() == 0; }
#endif

}  // namespace

const Kernels* usable_kernels(int i) {
  static const Entry entries[] = {
#ifdef EK_AMX
      {&amx::kernels, amx_is_usable()},
#endif
#ifdef EK_X86
      {&avx512_bf16::kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {&avx512::kernels, has_avx512()},
      {&avx2::kernels, has_avx2()},
#endif
#ifdef EK_AARCH64
      {&neon_bf16::kernels, has_neon_bf16()},
      {&neon::kernels, true},
#endif
      {&portable::kernels, true},
  };
  for (const Entry& entry : entries)
    if (entry.usable && i-- == 0) return entry.kernels;
  return nullptr;
}

const Kernels* model_kernels() {
#ifdef EK_X86
  if (has_avx2()) return &amx_model::kernels;
#endif
  return nullptr;
}

const char* why_no_amx() {
  static const char* const why = ask_for_amx();
  return why;
}

const Kernels* find_kernels(const char* name) {
  const Kernels* model = model_kernels();
  if (model != nullptr && std::strcmp(name, model->name) == 0) return model;
  for (int i = 0; const Kernels* kernels = usable_kernels(i); ++i)
    if (std::strcmp(name, kernels->name) == 0) return kernels;
  return nullptr;
}

}  // namespace entropy_kernels
