// Vectors of the instruction set this file is compiled for: EK_LANES floats each.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace EK_ISA {

constexpr int kLanes = EK_LANES;
typedef float Vec __attribute__((vector_size(EK_LANES * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(EK_LANES * 4)));

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// x - 0 is x, also for -0; x + 0 is not, and would cost an addition and a shuffle at every broadcast.
static inline Vec splat(float x) { return x - Vec{}; }

// The larger of each pair; a NaN in `b` stays, one in `a` does not.
static inline Vec larger(Vec a, Vec b) {
#ifdef __AVX512F__
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// 2^n for an integral n in [-126, 0], times x.
static inline Vec scale_by_power(Vec x, Vec n) {
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const Vec shifted = n + splat(12582912.0f + 127.0f);  // its low bits are n + 127
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x * power;
#endif
}

static inline Vec nearest(Vec x) {
#ifdef __AVX512F__
  return (Vec)_mm512_roundscale_ps((__m512)x, 0);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  return (x + magic) - magic;
#endif
}

// exp of x in [-87, 0], within 1.5 ulp: 2^n p(r), r = x - n ln 2 in two parts, |r| <= ln 2 / 2.
static inline Vec exp_nonpositive(Vec x) {
  const Vec n = nearest(x * splat(1.44269504f));
  const Vec r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);  // Cephes' polynomial for (exp(r) - 1 - r) / r^2
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  return scale_by_power(p, n);
}

static inline float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; a NaN stays one.
static inline std::uint16_t to_bf16(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return std::uint16_t((bits >> 16) | 0x40);
  return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float from_f16(std::uint16_t x) {
  const std::uint32_t sign = std::uint32_t(x & 0x8000) << 16;
  std::uint32_t bits = std::uint32_t(x & 0x7fff) << 13;
  float f;
  if ((x & 0x7c00) == 0x7c00) {  // inf, NaN
    bits |= 0x7f800000u;
    std::memcpy(&f, &bits, 4);
  } else {  // 2^112 makes up for the difference of the exponents' biases, subnormals included
    std::memcpy(&f, &bits, 4);
    f *= 5.192296858534828e33f;
  }
  std::uint32_t out;
  std::memcpy(&out, &f, 4);
  out |= sign;
  std::memcpy(&f, &out, 4);
  return f;
}

// Round to nearest even, subnormals included; overflow is inf.
static inline std::uint16_t to_f16(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return std::uint16_t(sign | 0x7e00);
  if (bits >= 0x47800000u) return std::uint16_t(sign | 0x7c00);
  if (bits < 0x38800000u) {  // below 2^-14: a float's addition rounds at 2^-24
    float magnitude, half = 0.5f;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += half;
    std::memcpy(&bits, &magnitude, 4);
    return std::uint16_t(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000000u + 0xfffu + ((bits >> 13) & 1);
  return std::uint16_t(sign | (bits >> 13));
}

}  // namespace EK_ISA
