// The subset of CUDA C++ that our kernels use, for a host compiler: kernel.h includes it, so that
// the text that nvcc compiles runs on fibers. With SIMT_CUDA_HEADERS defined, which CuTe's headers
// need, the toolkit's headers say what a dim3 and a float4 are.
//
// What hardware leaves undefined ends the program with a message: threads that meet at different
// instructions or barriers, lanes outside their own mask, threads that end while others wait for
// them, addresses that are not as a kernel assumes. A lane that reads another outside the mask gets
// ones in every bit. Atomics and shuffles order no other memory; a __threadfence before one atomic
// and one after another do.
#pragma once
#ifdef SIMT_CUDA_HEADERS
#include <cuda_runtime.h>
#endif

#include <cmath>

#include "fibers.h"

#ifdef SIMT_CUDA_HEADERS
#undef __launch_bounds__
#else
using cudaStream_t = void*;
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
#endif
#define __launch_bounds__(...)

#define EK_HD inline
#define EK_DEVICE inline
#define EK_SHARED(name, ...)          \
  static char const name##_place = 0; \
  auto& name = ::simt::shared_as<__VA_ARGS__>(&name##_place)
#define EK_DYNAMIC(name, ...) \
  auto* const name = reinterpret_cast<__VA_ARGS__*>(::simt::dynamic_shared())
#define EK_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...) \
  ::simt::launch(grid, block, bytes, [&] { kernel(__VA_ARGS__); })

namespace simt {

SIMT_UNSEEN inline dim3 thread_index() { return now->index; }
SIMT_UNSEEN inline dim3 block_index() { return block->index; }
SIMT_UNSEEN inline dim3 block_size() { return block->size; }
SIMT_UNSEEN inline dim3 grid_size() { return block->grid; }
SIMT_UNSEEN inline uint64_t met(unsigned lane) { return now->met[lane]; }
SIMT_UNSEEN inline unsigned lane() { return now->rank % kWarp; }
SIMT_UNSEEN inline unsigned char* dynamic_shared() { return block->dynamic; }
template <class T>
T& shared_as(void const* place) {
  return *static_cast<T*>(shared(place, sizeof(T)));
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(From) <= sizeof(To) || sizeof(To) <= sizeof(From));
  To to{};
  std::memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

// One lane's value of all that the lanes of `mask` bring.
template <class T>
T shuffle(char const* where, unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= 8);
  meet_lanes(where, mask, bits_as<uint64_t>(value), false);
  return bits_as<T>(met(from));
}
inline void check_width(char const* where, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("%s: width must be a power of two up to 32; got %d", where, width);
}
template <class T>
T shuffle_index(char const* where, unsigned mask, T value, int from, int width = 32) {
  check_width(where, width);
  return shuffle(where, mask, value, (lane() & -unsigned(width)) | (unsigned(from) & (width - 1)));
}
template <class T>
T shuffle_xor(char const* where, unsigned mask, T value, int with, int width = 32) {
  check_width(where, width);
  unsigned const from = (lane() ^ unsigned(with)) % kWarp;
  return shuffle(where, mask, value, from < (lane() & -unsigned(width)) + width ? from : lane());
}
template <class T>
T shuffle_up(char const* where, unsigned mask, T value, unsigned by, int width = 32) {
  check_width(where, width);
  return shuffle(where, mask, value, lane() % width >= by ? lane() - by : lane());
}
template <class T>
T shuffle_down(char const* where, unsigned mask, T value, unsigned by, int width = 32) {
  check_width(where, width);
  return shuffle(where, mask, value, lane() % width + by < unsigned(width) ? lane() + by : lane());
}

// The lanes of `mask` that satisfy `is`.
template <class Is>
unsigned lanes_where(char const* where, unsigned mask, uint64_t value, Is is) {
  meet_lanes(where, mask, value, false);
  unsigned lanes = 0;
  for (unsigned i = 0; i < kWarp; ++i) lanes |= unsigned((mask >> i & 1) && is(met(i))) << i;
  return lanes;
}
inline unsigned ballot(char const* where, unsigned mask, int is) {
  return lanes_where(where, mask, is != 0, [](uint64_t brought) { return brought != 0; });
}
inline int any(char const* where, unsigned mask, int is) { return ballot(where, mask, is) != 0; }
inline int all(char const* where, unsigned mask, int is) { return ballot(where, mask, is) == mask; }
template <class T>
unsigned match_any(char const* where, unsigned mask, T value) {
  auto const mine = bits_as<uint64_t>(value);
  return lanes_where(where, mask, mine, [mine](uint64_t brought) { return brought == mine; });
}
inline void sync_warp(char const* where, unsigned mask = ~0u) { meet_lanes(where, mask, 0, true); }

inline void const* assume_aligned(char const* where, void const* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("%s: %p is no multiple of %zu bytes", where, address, bytes);
  return address;
}

// An atomic read and write. As in C++, it carries what came before this thread's last
// __threadfence, to what follows the next __threadfence of a thread that reads its result.
SIMT_UNSEEN inline void begin_atomic(void* p) {
  pause();
  if (now->fenced) release(p);
}
SIMT_UNSEEN inline void end_atomic(void* p) { now->atomic = p; }
SIMT_UNSEEN inline void fence() {
  if (now->atomic) acquire(now->atomic);
  now->fenced = true;
}
template <class T, class F>
T atomic(T* p, F next) {
  begin_atomic(p);
  T old, updated;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  updated = next(old);
  __atomic_store(p, &updated, __ATOMIC_RELAXED);  // no other thread runs in between
  end_atomic(p);
  return old;
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

#define SIMT_TEXT_OF(x) #x
#define SIMT_TEXT(x) SIMT_TEXT_OF(x)
#define SIMT_HERE(name) __FILE__ ":" SIMT_TEXT(__LINE__) " " name
#define __syncthreads() ::simt::meet_block(SIMT_HERE("__syncthreads"))
#define __syncwarp(...) ::simt::sync_warp(SIMT_HERE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) ::simt::shuffle_index(SIMT_HERE("__shfl_sync"), __VA_ARGS__)
#define __shfl_xor_sync(...) ::simt::shuffle_xor(SIMT_HERE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) ::simt::shuffle_up(SIMT_HERE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) ::simt::shuffle_down(SIMT_HERE("__shfl_down_sync"), __VA_ARGS__)
#define __ballot_sync(...) ::simt::ballot(SIMT_HERE("__ballot_sync"), __VA_ARGS__)
#define __any_sync(...) ::simt::any(SIMT_HERE("__any_sync"), __VA_ARGS__)
#define __all_sync(...) ::simt::all(SIMT_HERE("__all_sync"), __VA_ARGS__)
#define __match_any_sync(...) ::simt::match_any(SIMT_HERE("__match_any_sync"), __VA_ARGS__)
#define __threadfence() ::simt::fence()
#define __builtin_assume_aligned(...) \
  ::simt::assume_aligned(SIMT_HERE("__builtin_assume_aligned"), __VA_ARGS__)

template <class T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> ||
                std::is_same_v<T, unsigned long long> || std::is_same_v<T, float> ||
                std::is_same_v<T, double>);
  return ::simt::atomic(p, [=](T old) { return old + value; });
}
template <class T>
T atomicMax(T* p, T value) {
  return ::simt::atomic(p, [=](T old) { return old < value ? value : old; });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __float_as_uint(float x) { return ::simt::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return ::simt::bits_as<float>(x); }
