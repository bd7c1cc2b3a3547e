// For programs that see what a function of launch.h refuses before any launch: the runtime's few
// calls are answered here, without a GPU.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

bool right = true;
int launched = 0, capability = 90;  // which kernel was launched; of the GPU
cudaError_t answer = cudaSuccess;
bool forgotten = false;  // whether CUDA's last error was taken

void expect(bool holds, std::string const& what) {
  if (!holds) std::printf("%s\n", what.c_str());
  right &= holds;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 3;
  return answer;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  expect(device == 3, "the current device is asked");
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  forgotten = true;
  return answer;
}
char const* cudaGetErrorName(cudaError_t) { return "cudaErrorName"; }
char const* cudaGetErrorString(cudaError_t) { return "why"; }

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// What `call` says where it refuses; "" where it does not.
template <class Call>
std::string refused(Call call) {
  launched = 0;
  try {
    call();
  } catch (std::runtime_error const& error) {
    expect(launched == 0, "nothing is launched where something is refused");
    return error.what();
  }
  return "";
}
