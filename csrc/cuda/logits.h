// From a product to a logit, and back to its slope: the formulas of the Triton kernels'
// logit_functions.py and dlogits_functions.py, fp32. nvcc and a host compiler take the same text.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernel.h"

namespace ek {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Below any logit, yet finite: its differences are finite too, also in units of log2.
constexpr float kLowest = -1e30f;
// exp2 of less is subnormal, and nothing to a sum that holds a 1. With exponents clamped to this,
// exponent times exp2 is finite, whatever the logit.
constexpr float kLowestExponent = -125.0f;

EK_HD float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

EK_HD float larger(float a, float b) {  // of a number and a NaN, the number
#ifdef __CUDA_ARCH__
  return fmaxf(a, b);
#else
  return std::fmax(a, b);
#endif
}

// a b, rounded: a difference that follows must not be fused with it, or a maximum minus itself
// would be the rounding and not 0.
EK_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

EK_HD float quotient(float a, float b) {  // within two units of the last place
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

EK_HD float bf16_at(void const* values, int64_t i) {
  uint32_t const bits = uint32_t(static_cast<uint16_t const*>(values)[i]) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// tanh to 2e-7 of its value. Near 0, where 1 - exp(-2x) would cancel, an odd polynomial.
EK_HD float tanh(float x) {
  float const y = fabsf(x);
  float const e = exp2_approx(y * (-2.0f * kLog2e));
  float const far = quotient(1.0f - e, 1.0f + e);
  float const q = y < 1.0f ? y * y : 1.0f;
  float p = 0.020805388f - 0.0059058721f * q;
  p = 0.133319583f + q * (p * q - 0.0537866847f);
  float const near = x + x * (q * (p * q - 0.333332993f));
  // A NaN takes the second branch, and stays.
  return y > 0.6f ? (x < 0.0f ? -far : far) : near;
}

// The derivative of tanh, 1 - tanh^2, to 4e-7 of its value.
EK_HD float tanh_slope(float x) {
  float const e = exp2_approx(fabsf(x) * (-2.0f * kLog2e));
  return quotient(4.0f * e, (1.0f + e) * (1.0f + e));
}

// softcap tanh(z / softcap), with the same bits in every kernel: nothing around it is fused with
// it.
EK_HD float capped(float z, float softcap) {
  return product(softcap, tanh(product(z, quotient(1.0f, softcap))));
}

// The derivative of `capped` at z, which is not yet capped.
EK_HD float cap_slope(float z, float softcap) {
  return tanh_slope(product(z, quotient(1.0f, softcap)));
}

// log(1 + x) for x >= 0, with all digits near 0.
EK_HD float log1p(float x) {
  float const y = 1.0f + x;
  // y - 1 is exact. The ratio repairs what rounding took from y.
  return y == 1.0f ? x : logf(y) * (x / (y - 1.0f));
}

// exp(x) - 1 for x <= 0, to 1e-7 of its value.
EK_HD float expm1(float x) {
  float p = x * (1.0f / 40320.0f) + (1.0f / 5040.0f);
  p = p * x + (1.0f / 720.0f);
  p = p * x + (1.0f / 120.0f);
  p = p * x + (1.0f / 24.0f);
  p = p * x + (1.0f / 6.0f);
  p = p * x + 0.5f;
  // A NaN takes the second branch, and stays.
  return x > -0.5f ? x + x * x * p : exp2_approx(x * kLog2e) - 1.0f;
}

// 1 / temperature of a row. The stride is 0 where all rows share one; null stands for 1.
EK_HD float inverse_temperature(float const* temperature, int64_t stride, int row) {
  return temperature == nullptr ? 1.0f : 1.0f / temperature[row * stride];
}

}  // namespace ek
