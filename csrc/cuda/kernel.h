// What the text of a kernel is written in: CUDA C++ under nvcc, and the subset of it in
// tests/cuda/simt.h under a host compiler, where every CUDA thread is a fiber.
//
// EK_HD, EK_DEVICE     before an inline function: for host and device; for the device
// EK_SHARED(x, T[n])   declares the static shared memory x of type T[n]
// EK_DYNAMIC(x, T)     declares T* x, the dynamic shared memory of the launch
// EK_LAUNCH(kernel, grid, block, stream, arguments...)
// EK_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, arguments...)
//                      launch, and throw std::runtime_error where CUDA refuses; a kernel with
//                      commas in its name stands in brackets
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <string>

#include "error.h"

#define EK_HD inline __host__ __device__
#define EK_DEVICE inline __device__
#define EK_SHARED(name, ...) __shared__::ek::Same<__VA_ARGS__> name
#define EK_DYNAMIC(name, ...)                                     \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  auto* const name = reinterpret_cast<__VA_ARGS__*>(dynamic_shared)
#define EK_LAUNCH_DYNAMIC(kernel, grid, block, bytes, stream, ...)                         \
  do {                                                                                     \
    kernel<<<grid, block, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);        \
    if (auto const error = cudaGetLastError()) ::ek::refused(error, #kernel, grid, block); \
  } while (0)

namespace ek {

template <class T>
using Same = T;

inline void refused(cudaError_t error, char const* kernel, dim3 grid, dim3 block) {
  auto const text = [](dim3 n) {
    return std::to_string(n.x) + " x " + std::to_string(n.y) + " x " + std::to_string(n.z);
  };
  check(error,
        std::string(kernel) + " on " + text(grid) + " blocks of " + text(block) + " threads");
}

}  // namespace ek
#else
#include "simt.h"
#endif

#define EK_LAUNCH(kernel, grid, block, stream, ...) \
  EK_LAUNCH_DYNAMIC(kernel, grid, block, 0, stream, __VA_ARGS__)
