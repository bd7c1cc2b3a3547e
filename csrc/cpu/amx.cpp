#include "amx.h"

#ifdef EK_X86

#include <cpuid.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace entropy_kernels {

bool processor_has_amx() {
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bf16) && (d & tile);
}

#ifdef __linux__

// Reads XCR0: which registers the operating system saves.
static bool saves_tiles() {
  constexpr unsigned osxsave = 1u << 27, tiles = 3u << 17;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & tiles) == tiles;
}

const char* request_amx() {
  // The code of arch_prctl that asks for a permission, and the number of the tile registers' state.
  constexpr int request_permission = 0x1023, tile_data = 18;
  if (!saves_tiles()) return "the operating system does not save the tile registers";
  if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) return "";
  // Every alternate signal stack of the process must hold a signal's frame, 11 KB with tiles.
  if (errno == ENOSPC)
    return "an alternate signal stack of the process is too small for the tile registers";
  return "the operating system refuses it (arch_prctl ARCH_REQ_XCOMP_PERM)";
}

#else

const char* request_amx() { return "tiles are used on Linux only"; }

#endif

}  // namespace entropy_kernels

#endif
