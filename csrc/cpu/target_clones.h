// TARGET_CLONES before a function compiles it once per instruction set. One is chosen when the
// module loads, by an ifunc, so only GCC with glibc does it.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define TARGET_CLONES
#endif
