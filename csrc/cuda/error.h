// What CUDA or CUTLASS refuses becomes an exception that names the call.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace ek {

// Leaves no error behind that a later call of anybody's would report.
inline void check(cudaError_t error, std::string const& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// The same of a cutlass::Status, without CUTLASS's headers: argument-dependent lookup finds
// its name.
template <class Status>
auto check(Status status, std::string const& what)
    -> decltype(void(cutlassGetStatusString(status))) {
  if (status == Status::kSuccess) return;
  throw std::runtime_error(what + ": CUTLASS refuses, " + cutlassGetStatusString(status));
}

}  // namespace ek
