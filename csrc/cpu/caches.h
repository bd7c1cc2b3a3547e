// The sizes of this machine's caches, which the sizes of blocks are chosen from.
#pragma once

#include <cstdint>

namespace entropy_kernels {

// In bytes: what one core has for itself, and the largest one, which cores share.
struct Caches {
  std::int64_t l2, last;
};

// What the operating system reports of the first core; 512 KB and 8 MB where it reports nothing.
Caches machine_caches();

}  // namespace entropy_kernels
