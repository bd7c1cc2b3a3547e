// Huge pages for memory that is written for the first time. With pages of 4 KB, page faults take 7%
// of the time of a backward.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace entropy_kernels {

// Asks for pages of 2 MB where [memory, memory + bytes) holds whole ones. The system may ignore it.
inline void prefer_huge_pages(void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t size = std::uintptr_t{1} << 21;
  const auto start = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (start + size - 1) / size * size;
  const std::uintptr_t last = (start + bytes) / size * size;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace entropy_kernels
