#pragma once

// Before a function: compiled once for each, chosen when the module loads. It needs ifunc, so GCC
// on glibc only.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define TARGET_CLONES
#endif
