#include "radix_histogram.h"

#include <algorithm>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "bits.h"
#include "target_clones.h"

namespace entropy_kernels {
namespace {

constexpr std::int64_t kBlock = 1024;
// Consecutive values count in different copies, since values of the same digit would wait for each
// other's store. Wide digits, whose copies would not fit the cache, have one copy.
constexpr int kCopies = 4;
constexpr int kMaxBitsToCopy = 12;
// Dummy bins for values that do not count, which saves a branch. One bin would wait for its stores.
constexpr std::uint32_t kDummies = 16;
[[maybe_unused]] constexpr std::int64_t kMinPerThread = 1 << 16;
// A thread counts in 32 bits, which keeps its copies in L1; no slab can overflow them.
constexpr std::int64_t kSlab = std::int64_t{1} << 32;

// Bins from one copy to the next; 0 if there is one copy.
inline std::int64_t copy_stride(int bits) {
  return bits <= kMaxBitsToCopy ? (std::int64_t{1} << bits) + kDummies : 0;
}

inline std::uint32_t ordered_key(float value) {
  const auto u = bits_as<std::uint32_t>(value);
  const std::uint32_t sign = static_cast<std::uint32_t>(static_cast<std::int32_t>(u) >> 31);
  std::uint32_t key = u ^ (sign | 0x80000000u);
  // In integers, since value + 0.0f would depend on whether denormals are flushed.
  key += key == 0x7FFFFFFFu;
  return (u & 0x7FFFFFFFu) > 0x7F800000u ? 0xFFFFFFFFu : key;
}

// Sets bins[i] to the digit of value i, or to a dummy bin. Returns how many values count.
template <bool kHasMask>
TARGET_CLONES std::uint32_t find_bins(const float* values, const std::uint8_t* mask, int n,
                                      RadixDigit digit, std::uint32_t* bins) {
  const std::uint32_t num_bins = 1u << digit.bits;
  const int rest = 32 - digit.prefix_bits;
  const std::uint32_t prefix_mask = rest == 32 ? 0u : ~0u << rest;
  const std::uint32_t prefix = rest == 32 ? 0u : digit.prefix << rest;
  const int shift = digit.shift;
  std::uint32_t count = 0;
  for (int i = 0; i < n; ++i) {
    const std::uint32_t key = ordered_key(values[i]);
    std::uint32_t counted = ((key ^ prefix) & prefix_mask) == 0u;
    if (kHasMask) counted &= mask[i] != 0;
    const std::uint32_t dummy = num_bins + static_cast<std::uint32_t>(i) % kDummies;
    bins[i] = counted ? (key >> shift) & (num_bins - 1u) : dummy;
    count += counted;
  }
  return count;
}

template <bool kHasMask>
void count_range(const float* values, const std::uint8_t* mask, std::int64_t begin,
                 std::int64_t end, RadixDigit digit, std::uint32_t* local) {
  const std::int64_t stride = copy_stride(digit.bits);
  alignas(64) std::uint32_t bins[kBlock];
  for (std::int64_t at = begin; at < end; at += kBlock) {
    const int n = static_cast<int>(std::min(kBlock, end - at));
    const std::uint8_t* block_mask = kHasMask ? mask + at : nullptr;
    if (find_bins<kHasMask>(values + at, block_mask, n, digit, bins) == 0) continue;
    int i = 0;
    for (; i + kCopies <= n; i += kCopies)
      for (int c = 0; c < kCopies; ++c) ++local[c * stride + bins[i + c]];
    for (; i < n; ++i) ++local[bins[i]];
  }
}

template <bool kHasMask>
void count_slab(const float* values, const std::uint8_t* mask, std::int64_t n, RadixDigit digit,
                std::int64_t* counts) {
  const std::int64_t num_bins = std::int64_t{1} << digit.bits;
  const std::int64_t copies = copy_stride(digit.bits) == 0 ? 1 : kCopies;
  const std::int64_t copy_size = num_bins + kDummies;
  int threads = 1;
#ifdef _OPENMP
  threads = static_cast<int>(
      std::clamp<std::int64_t>(n / std::max(kMinPerThread, num_bins), 1, omp_get_max_threads()));
#endif
  const std::int64_t share = (n + threads - 1) / threads;
  std::vector<std::uint32_t> local(threads * copies * copy_size, 0);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t)
    count_range<kHasMask>(values, mask, std::min(n, t * share), std::min(n, (t + 1) * share), digit,
                          local.data() + t * copies * copy_size);
  for (std::int64_t copy = 0; copy < threads * copies; ++copy)
    for (std::int64_t bin = 0; bin < num_bins; ++bin) counts[bin] += local[copy * copy_size + bin];
}

}  // namespace

void radix_histogram(const float* values, const std::uint8_t* mask, std::int64_t n,
                     RadixDigit digit, std::int64_t* counts) {
  for (std::int64_t at = 0; at < n; at += kSlab) {
    const std::int64_t size = std::min(kSlab, n - at);
    if (mask == nullptr)
      count_slab<false>(values + at, nullptr, size, digit, counts);
    else
      count_slab<true>(values + at, mask + at, size, digit, counts);
  }
}

}  // namespace entropy_kernels
