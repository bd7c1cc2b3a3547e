// The sizes of this machine's caches; the kernels choose the sizes of their blocks by them.
#pragma once

#include <cstdint>

namespace entropy_kernels {

// Bytes of a core's second-level cache, and of the last level, which cores share.
struct Caches {
  std::int64_t l2, last;
};

// The sizes that the operating system reports for the first core, else 512 KB and 8 MB.
Caches machine_caches();

}  // namespace entropy_kernels
