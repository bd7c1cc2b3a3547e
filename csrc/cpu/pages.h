// Memory that is written for the first time: at 4 KB a page its faults cost a backward 7% of its
// time.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace entropy_kernels {

// Asks for pages of 2 MB where [memory, memory + bytes) holds whole ones; a hint, refused silently.
inline void prefer_huge_pages(void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t size = std::uintptr_t{1} << 21;
  const auto start = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (start + size - 1) / size * size,
                       last = (start + bytes) / size * size;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace entropy_kernels
