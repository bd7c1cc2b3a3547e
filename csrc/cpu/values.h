// Values of any dtype, read as vectors of fp32 and written from fp32.
#pragma once

#include <type_traits>

#include "head.h"
#include "vector.h"

namespace EK_ISA {

using entropy_kernels::Dtype;
using entropy_kernels::Matrix;

static constexpr std::int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// The vector of values at `from`.
template <Dtype kDtype>
static inline Vec widened(const char* from) {
  if constexpr (kDtype == Dtype::f32)
    return read_as<Vec>(from);
  else if constexpr (kDtype == Dtype::bf16)
    return bits_as<Vec>(__builtin_convertvector(read_as<HalfVec>(from), UnitVec) << 16);
  else
    return from_f16(read_as<HalfVec>(from));
}

// Fewer values than a vector has, followed by zeros.
template <Dtype kDtype>
static inline Vec widened_tail(const char* from, std::int64_t count) {
  char values[kLanes * bytes_of(kDtype)] = {};
  std::memcpy(values, from, count * bytes_of(kDtype));
  return widened<kDtype>(values);
}

// Calls `run` with the dtype as a type, whose `value` is a constant.
template <class Run>
static auto with_dtype(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::bf16: return run(std::integral_constant<Dtype, Dtype::bf16>{});
    case Dtype::f16: return run(std::integral_constant<Dtype, Dtype::f16>{});
    default: return run(std::integral_constant<Dtype, Dtype::f32>{});
  }
}

static inline const char* row_of(const Matrix& matrix, std::int64_t i) {
  return static_cast<const char*>(matrix.data) + i * matrix.stride * bytes_of(matrix.dtype);
}

// Writes, or adds, `count` values to `out`. A sum is rounded once into its dtype.
static void write_values(void* out, Dtype dtype, bool add, std::int64_t count,
                         const float* values) {
  if (dtype == Dtype::f32) {
    auto* sum = static_cast<float*>(out);
    if (!add)
      std::memcpy(sum, values, count * 4);
    else
      for (std::int64_t i = 0; i < count; ++i) sum[i] += values[i];
    return;
  }
  auto* half = static_cast<std::uint16_t*>(out);
  if (!add) {
    for (std::int64_t i = 0; i < count; ++i)
      half[i] = dtype == Dtype::bf16 ? to_bf16(values[i]) : to_f16(values[i]);
  } else if (dtype == Dtype::bf16) {
    for (std::int64_t i = 0; i < count; ++i) half[i] = to_bf16(from_bf16(half[i]) + values[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) half[i] = to_f16(from_f16(half[i]) + values[i]);
  }
}

}  // namespace EK_ISA
