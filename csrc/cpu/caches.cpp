#include "caches.h"

#include <algorithm>
#include <string>

#ifdef __linux__
#include <fstream>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace entropy_kernels {

namespace {

#ifdef __linux__
std::string line_of(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Bytes of the data cache of `level`, 0 if there is none. The files say "48K" or "2M".
std::int64_t cache(int level) {
  for (int i = 0; i < 8; ++i) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    if (line_of(folder + "level") != std::to_string(level)) continue;
    if (line_of(folder + "type") == "Instruction") continue;
    std::int64_t size = 0;
    for (const char c : line_of(folder + "size")) {
      if (c >= '0' && c <= '9') size = 10 * size + (c - '0');
      if (c == 'K') size <<= 10;
      if (c == 'M') size <<= 20;
    }
    return size;
  }
  return 0;
}
#elif defined(__APPLE__)
std::int64_t cache(int level) {
  const std::string name = "l" + std::to_string(level) + "cachesize";
  for (const std::string& prefix : {"hw.perflevel0.", "hw."}) {
    std::int64_t size = 0;
    std::size_t length = sizeof size;
    if (sysctlbyname((prefix + name).c_str(), &size, &length, nullptr, 0) == 0 && size > 0)
      return size;
  }
  return 0;
}
#else
std::int64_t cache(int) { return 0; }
#endif

}  // namespace

Caches machine_caches() {
  const std::int64_t l2 = cache(2), last = std::max(l2, cache(3));
  return {l2 > 0 ? l2 : std::int64_t{512} << 10, last > 0 ? last : std::int64_t{8} << 20};
}

}  // namespace entropy_kernels
