// Vectors of EK_LANES floats, and conversions between fp32, bf16 and fp16.
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#include "isa.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace EK_ISA {

constexpr int kLanes = EK_LANES;
typedef float Vec __attribute__((vector_size(EK_LANES * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(EK_LANES * 4)));
typedef std::uint32_t UnitVec __attribute__((vector_size(EK_LANES * 4)));
typedef std::uint16_t HalfVec __attribute__((vector_size(EK_LANES * 2)));

static inline Vec load(const float* p) { return read_as<Vec>(p); }

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// x - 0 is x for -0 too. x + 0 is not, and would cost an addition and a shuffle per broadcast.
static inline Vec splat(float x) { return x - Vec{}; }

// The larger of each pair. A NaN in `b` stays and one in `a` does not, as in vmaxps. NEON's FMAX
// keeps both, its FMAXNM keeps none.
static inline Vec larger(Vec a, Vec b) {
#ifdef __AVX512F__
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// x times 2^n, n an integer in [-126, 0].
static inline Vec scale_by_power(Vec x, Vec n) {
#ifdef __AVX512F__
  return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const Vec shifted = n + splat(12582912.0f + 127.0f);  // its low bits are n + 127
  return x * bits_as<Vec>(bits_as<IntVec>(shifted) << 23);
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

static inline float from_bf16(std::uint16_t x) { return bits_as<float>(std::uint32_t{x} << 16); }

// Rounds to nearest even; a NaN stays one.
static inline std::uint16_t to_bf16(float f) {
  const auto bits = bits_as<std::uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return std::uint16_t((bits >> 16) | 0x40);
  return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#ifdef __ARM_FP16_FORMAT_IEEE
static inline float from_f16(std::uint16_t x) { return bits_as<__fp16>(x); }

// Rounds to nearest even; a NaN stays one.
static inline std::uint16_t to_f16(float f) { return bits_as<std::uint16_t>(__fp16(f)); }
#else
static inline float from_f16(std::uint16_t x) {
  const std::uint32_t sign = std::uint32_t(x & 0x8000) << 16;
  const std::uint32_t bits = std::uint32_t(x & 0x7fff) << 13;
  if ((x & 0x7c00) == 0x7c00) return bits_as<float>(sign | bits | 0x7f800000u);  // inf, NaN
  // 2^112 is the difference of the exponents' biases; this holds for subnormals too
  const float magnitude = bits_as<float>(bits) * 5.192296858534828e33f;
  return bits_as<float>(sign | bits_as<std::uint32_t>(magnitude));
}

// Rounds to nearest even, subnormals included; overflow is inf.
static inline std::uint16_t to_f16(float f) {
  auto bits = bits_as<std::uint32_t>(f);
  const std::uint16_t sign = std::uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return std::uint16_t(sign | 0x7e00);
  if (bits >= 0x47800000u) return std::uint16_t(sign | 0x7c00);
  if (bits < 0x38800000u) {  // below 2^-14, adding 0.5 rounds at 2^-24
    const float magnitude = bits_as<float>(bits) + 0.5f;
    return std::uint16_t(sign | (bits_as<std::uint32_t>(magnitude) - 0x3f000000u));
  }
  bits += 0xc8000000u + 0xfffu + ((bits >> 13) & 1);
  return std::uint16_t(sign | (bits >> 13));
}
#endif

static inline Vec from_f16(HalfVec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16((float16x4_t)x);
#else
  Vec wide{};
  for (int i = 0; i < kLanes; ++i) wide[i] = from_f16(x[i]);
  return wide;
#endif
}

// Converts `count` values from fp16 to fp32, whole vectors by the processor's instruction if any.
static inline void widen_f16(const char* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, from_f16(read_as<HalfVec>(from + 2 * i)));
  for (; i < count; ++i) to[i] = from_f16(read_as<std::uint16_t>(from + 2 * i));
}

#ifdef EK_BF16
// Pairs of bf16 that are neighbours along k, a pair per lane, the first in the low half.
typedef UnitVec Pairs;

static inline Pairs load_pairs(const std::uint32_t* p) { return read_as<Pairs>(p); }

#ifdef __AVX512BF16__
typedef Pairs OnePair;

static inline OnePair splat_pair(const std::uint32_t* p) { return Pairs{} + *p; }

// acc + a0 b0 + a1 b1. Two roundings to nearest; subnormals count as zero.
static inline Vec add_products(Vec acc, OnePair a, Pairs b) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)b, (__m512bh)a);
}

// Rounds to nearest even; a NaN stays one.
static inline HalfVec to_bf16(Vec x) { return (HalfVec)_mm512_cvtneps_pbh((__m512)x); }

static inline Pairs pair_up(HalfVec first, HalfVec second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)first);
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)second);
  return (Pairs)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#else
typedef bfloat16x4_t OnePair;

// The pair in the lowest lane, which BFDOT reads. Filling all lanes would cost a shuffle.
static inline OnePair splat_pair(const std::uint32_t* p) {
  return vreinterpret_bf16_u32(uint32x2_t{*p, 0});
}

// acc + a0 b0 + a1 b1. Two roundings to odd, each with twice the error of one to nearest;
// subnormals count as zero. BFMMLA does twice the work, but needs operands packed as 2 x 4 values.
static inline Vec add_products(Vec acc, OnePair a, Pairs b) {
  return (Vec)vbfdotq_lane_f32((float32x4_t)acc, vreinterpretq_bf16_u32((uint32x4_t)b), a, 0);
}

// Rounds to nearest even; a NaN stays one.
static inline HalfVec to_bf16(Vec x) {
  return (HalfVec)vget_low_bf16(vcvtq_low_bf16_f32((float32x4_t)x));
}

static inline Pairs pair_up(HalfVec first, HalfVec second) {
  const uint16x8_t low = vcombine_u16((uint16x4_t)first, (uint16x4_t)first);
  const uint16x8_t high = vcombine_u16((uint16x4_t)second, (uint16x4_t)second);
  return (Pairs)vzip1q_u16(low, high);
}
#endif
#endif

}  // namespace EK_ISA
