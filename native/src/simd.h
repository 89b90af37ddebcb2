// One virtual vector of 16 float32 lanes; every instruction set gives the same bits.
//
// Include only from `*_kernels.cpp`, which are compiled once per instruction set with VIVACE_ISA
// (the namespace) and VIVACE_LEVEL (0 generic, 1 AVX2, 2 AVX-512, 3 with VNNI, 4 with BF16 too).
// Everything here has internal linkage: an inline function that two objects share could be linked
// in the variant that the CPU at hand cannot run. For the same reason kernel files use no std::
// templates.
//
// Results are those of IEEE 754 with round to nearest even under FloatEnvironment (denormals are
// zero). Comparisons, min and max follow x86: min(a, b) = a < b ? a : b, so a NaN yields b.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(VIVACE_ISA) || !defined(VIVACE_LEVEL)
#error "simd.h is for kernel files: CMake defines VIVACE_ISA and VIVACE_LEVEL for them"
#endif
#if VIVACE_LEVEL > 0
#include <immintrin.h>
#endif

#define VIVACE_INLINE [[gnu::always_inline]] static inline
#define VIVACE_MEMBER [[gnu::always_inline]] inline
#define VIVACE_UNROLL _Pragma("GCC unroll 32")

namespace vivace::VIVACE_ISA {
namespace {

inline constexpr int kLanes = 16;

// ---------------------------------------------------------------- bits of scalars

VIVACE_INLINE uint32_t bits_of(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
VIVACE_INLINE float float_of(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
VIVACE_INLINE float infinity() {
  return __builtin_inff();
}

VIVACE_INLINE float bf16_to_float(uint16_t x) {
  return float_of(static_cast<uint32_t>(x) << 16);
}

// Round to nearest even; denormals become zero, as VCVTNEPS2BF16 does.
VIVACE_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  if ((bits & 0x7f800000u) == 0) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Half denormals are exact, as in VCVTPH2PS.
VIVACE_INLINE float f16_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t exponent = h >> 10 & 0x1fu, mantissa = h & 0x3ffu;
  if (exponent == 0x1f)
    return float_of(sign | 0x7f800000u | mantissa << 13 | (mantissa ? 0x400000u : 0u));
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  if (mantissa == 0) return float_of(sign);
  int shift = __builtin_clz(mantissa) - 21;  // brings the leading one to bit 10
  return float_of(sign | static_cast<uint32_t>(113 - shift) << 23 |
                  (mantissa << shift & 0x3ffu) << 13);
}

// Round to nearest even, overflow to infinity, half denormals exact, as in VCVTPS2PH.
VIVACE_INLINE uint16_t float_to_f16(float x) {
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);
  uint32_t value, rest, half;
  if (magnitude >= 0x38800000u) {
    value = (magnitude >> 13) - (112u << 10);
    rest = magnitude & 0x1fffu;
    half = 0x1000u;
  } else {  // a half denormal
    uint32_t shift = 126 - (magnitude >> 23);
    uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    value = mantissa >> shift;
    rest = mantissa & ((1u << shift) - 1);
    half = 1u << (shift - 1);
  }
  value += rest > half || (rest == half && (value & 1u));
  return static_cast<uint16_t>(sign | value);
}

// ---------------------------------------------------------------- the vector types

#if VIVACE_LEVEL >= 2
struct F32x16 {
  __m512 v;
};
struct Mask16 {
  __mmask16 v;
};
struct Pairs {  // 32 bfloat16: lane i holds elements 2i (low half) and 2i + 1
  __m512i v;
};
#elif VIVACE_LEVEL == 1
struct F32x16 {
  __m256 lo, hi;
};
struct Mask16 {
  __m256 lo, hi;
};
struct Pairs {
  __m256i lo, hi;
};
#else
typedef float Float16Lanes __attribute__((vector_size(64)));
typedef uint32_t Uint16Lanes __attribute__((vector_size(64)));
typedef int32_t Int16Lanes __attribute__((vector_size(64)));
struct F32x16 {
  Float16Lanes v;
};
struct Mask16 {
  Int16Lanes v;
};
struct Pairs {
  Uint16Lanes v;
};
#endif

// ---------------------------------------------------------------- loads and stores

VIVACE_INLINE F32x16 set1(float x) {
#if VIVACE_LEVEL >= 2
  return {_mm512_set1_ps(x)};
#elif VIVACE_LEVEL == 1
  return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
#else
  return {x - Float16Lanes{}};  // a sum would make +0 of -0
#endif
}

VIVACE_INLINE F32x16 zero() {
#if VIVACE_LEVEL >= 2
  return {_mm512_setzero_ps()};
#elif VIVACE_LEVEL == 1
  return {_mm256_setzero_ps(), _mm256_setzero_ps()};
#else
  return {Float16Lanes{}};
#endif
}

VIVACE_INLINE F32x16 load(const float* p) {
#if VIVACE_LEVEL >= 2
  return {_mm512_loadu_ps(p)};
#elif VIVACE_LEVEL == 1
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
#else
  F32x16 r;
  __builtin_memcpy(&r.v, p, 64);
  return r;
#endif
}

VIVACE_INLINE void store(float* p, F32x16 x) {
#if VIVACE_LEVEL >= 2
  _mm512_storeu_ps(p, x.v);
#elif VIVACE_LEVEL == 1
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
#else
  __builtin_memcpy(p, &x.v, 64);
#endif
}

// The first n lanes (0 <= n <= 16), zeros after them; touches no memory past n.
VIVACE_INLINE F32x16 load_first(const float* p, int n) {
#if VIVACE_LEVEL >= 2
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
#else
  float buffer[16] = {};
  for (int i = 0; i < n; ++i) __builtin_memcpy(buffer + i, p + i, 4);
  return load(buffer);
#endif
}

VIVACE_INLINE void store_first(float* p, F32x16 x, int n) {
#if VIVACE_LEVEL >= 2
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
#else
  float buffer[16];
  store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

VIVACE_INLINE F32x16 load_bf16(const uint16_t* p) {
#if VIVACE_LEVEL >= 2
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
#elif VIVACE_LEVEL == 1
  __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
#else
  uint16_t raw[16];
  __builtin_memcpy(raw, p, 32);
  Uint16Lanes wide;
  for (int i = 0; i < 16; ++i) wide[i] = static_cast<uint32_t>(raw[i]) << 16;
  return {reinterpret_cast<Float16Lanes>(wide)};
#endif
}

VIVACE_INLINE F32x16 load_bf16_first(const uint16_t* p, int n) {
  uint16_t buffer[16] = {};
  for (int i = 0; i < n; ++i) __builtin_memcpy(buffer + i, p + i, 2);
  return load_bf16(buffer);
}

VIVACE_INLINE F32x16 load_f16(const uint16_t* p) {
#if VIVACE_LEVEL >= 2
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif VIVACE_LEVEL == 1
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
#else
  float buffer[16];
  for (int i = 0; i < 16; ++i) {
    uint16_t half;
    __builtin_memcpy(&half, p + i, 2);
    buffer[i] = f16_to_float(half);
  }
  return load(buffer);
#endif
}

VIVACE_INLINE F32x16 load_f16_first(const uint16_t* p, int n) {
  uint16_t buffer[16] = {};
  for (int i = 0; i < n; ++i) __builtin_memcpy(buffer + i, p + i, 2);
  return load_f16(buffer);
}

#if VIVACE_LEVEL == 1
// float_to_bf16 of 8 lanes, each in 32 bits.
VIVACE_INLINE __m256i round_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
  const __m256i tiny = _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), _mm256_setzero_si256());
  sum = _mm256_blendv_epi8(sum, _mm256_and_si256(bits, _mm256_set1_epi32(INT32_MIN)), tiny);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  sum = _mm256_blendv_epi8(sum, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  return _mm256_srli_epi32(sum, 16);
}

#endif

#if VIVACE_LEVEL > 0
// 16 bfloat16 as float_to_bf16 rounds them.
VIVACE_INLINE __m256i round_to_bf16(F32x16 x) {
#if VIVACE_LEVEL >= 4
  return __builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(x.v));
#elif VIVACE_LEVEL >= 2
  const __m512i bits = _mm512_castps_si512(x.v), top = _mm512_srli_epi32(bits, 16);
  const __m512i lsb = _mm512_and_si512(top, _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
  __m512i high = _mm512_srli_epi32(sum, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __mmask16 tiny = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  high = _mm512_mask_or_epi32(high, nan, top, _mm512_set1_epi32(0x40));
  high = _mm512_mask_and_epi32(high, tiny, top, _mm512_set1_epi32(0x8000));
  return _mm512_cvtepi32_epi16(high);
#else
  const __m256i words = _mm256_packus_epi32(round_to_bf16(x.lo), round_to_bf16(x.hi));
  return _mm256_permute4x64_epi64(words, 0xd8);
#endif
}
#endif

VIVACE_INLINE void store_bf16(uint16_t* p, F32x16 x) {
#if VIVACE_LEVEL > 0
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(x));
#else
  float buffer[16];
  store(buffer, x);
  uint16_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = float_to_bf16(buffer[i]);
  __builtin_memcpy(p, out, 32);
#endif
}

VIVACE_INLINE void store_f16(uint16_t* p, F32x16 x) {
#if VIVACE_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif VIVACE_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8),
                   _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT));
#else
  float buffer[16];
  store(buffer, x);
  uint16_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = float_to_f16(buffer[i]);
  __builtin_memcpy(p, out, 32);
#endif
}

// ---------------------------------------------------------------- arithmetic

#if VIVACE_LEVEL >= 2
#define VIVACE_BINARY(name, intrinsic, op)        \
  VIVACE_INLINE F32x16 name(F32x16 a, F32x16 b) { \
    return {_mm512_##intrinsic(a.v, b.v)};        \
  }
#elif VIVACE_LEVEL == 1
#define VIVACE_BINARY(name, intrinsic, op)                                   \
  VIVACE_INLINE F32x16 name(F32x16 a, F32x16 b) {                            \
    return {_mm256_##intrinsic(a.lo, b.lo), _mm256_##intrinsic(a.hi, b.hi)}; \
  }
#else
#define VIVACE_BINARY(name, intrinsic, op)        \
  VIVACE_INLINE F32x16 name(F32x16 a, F32x16 b) { \
    return {op};                                  \
  }
#endif
VIVACE_BINARY(add, add_ps, a.v + b.v)
VIVACE_BINARY(sub, sub_ps, a.v - b.v)
VIVACE_BINARY(mul, mul_ps, a.v* b.v)
VIVACE_BINARY(div, div_ps, a.v / b.v)
VIVACE_BINARY(min, min_ps, a.v < b.v ? a.v : b.v)
VIVACE_BINARY(max, max_ps, a.v > b.v ? a.v : b.v)
#undef VIVACE_BINARY

// a * b + c with one rounding, for one lane.
VIVACE_INLINE float fma1(float a, float b, float c) {
#if VIVACE_LEVEL > 0 || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in double. The sum is rounded to odd (Boldo and Melquiond 2008), so that
  // rounding it once more to float equals a single rounding.
  double product = static_cast<double>(a) * static_cast<double>(b), addend = c;
  double sum = product + addend, part = sum - product;
  double error = (product - (sum - part)) + (addend - part);
  uint64_t bits = __builtin_bit_cast(uint64_t, sum);
  bool inexact = error < 0 || error > 0;  // false for NaN: sum is not finite
  if (inexact && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
  return static_cast<float>(__builtin_bit_cast(double, bits));
#endif
}

VIVACE_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
#if VIVACE_LEVEL >= 2
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
#elif VIVACE_LEVEL == 1
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
#else
  F32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = fma1(a.v[i], b.v[i], c.v[i]);
  return r;
#endif
}

VIVACE_INLINE float rsqrt1(float a) {
  return 1.0f / __builtin_sqrtf(a);
}

VIVACE_INLINE F32x16 negate(F32x16 a) {
#if VIVACE_LEVEL >= 2
  return {_mm512_castsi512_ps(
      _mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(INT32_MIN)))};
#elif VIVACE_LEVEL == 1
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
#else
  return {-a.v};
#endif
}

VIVACE_INLINE F32x16 abs(F32x16 a) {
#if VIVACE_LEVEL >= 2
  return {_mm512_abs_ps(a.v)};
#elif VIVACE_LEVEL == 1
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
#else
  return {reinterpret_cast<Float16Lanes>(reinterpret_cast<Uint16Lanes>(a.v) & 0x7fffffffu)};
#endif
}

// ---------------------------------------------------------------- comparison

// a < b, false where either is NaN.
VIVACE_INLINE Mask16 less(F32x16 a, F32x16 b) {
#if VIVACE_LEVEL >= 2
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
#elif VIVACE_LEVEL == 1
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
#else
  return {a.v < b.v};
#endif
}

// Lanes below n.
VIVACE_INLINE Mask16 first_lanes(int n) {
#if VIVACE_LEVEL >= 2
  return {static_cast<__mmask16>((1u << n) - 1)};
#elif VIVACE_LEVEL == 1
  __m256i limit = _mm256_set1_epi32(n);
  __m256i a = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i b = _mm256_add_epi32(a, _mm256_set1_epi32(8));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, a)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, b))};
#else
  Mask16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = i < n ? -1 : 0;
  return r;
#endif
}

// Bit i: lane i.
VIVACE_INLINE uint32_t mask_bits(Mask16 mask) {
#if VIVACE_LEVEL >= 2
  return mask.v;
#elif VIVACE_LEVEL == 1
  return static_cast<uint32_t>(_mm256_movemask_ps(mask.lo) | _mm256_movemask_ps(mask.hi) << 8);
#else
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(mask.v[i] & 1) << i;
  return bits;
#endif
}

// mask ? a : b
VIVACE_INLINE F32x16 select(Mask16 mask, F32x16 a, F32x16 b) {
#if VIVACE_LEVEL >= 2
  return {_mm512_mask_blend_ps(mask.v, b.v, a.v)};
#elif VIVACE_LEVEL == 1
  return {_mm256_blendv_ps(b.lo, a.lo, mask.lo), _mm256_blendv_ps(b.hi, a.hi, mask.hi)};
#else
  return {mask.v ? a.v : b.v};
#endif
}

// ---------------------------------------------------------------- reductions

// The fixed tree: lanes i and i + 8, then i and i + 4, i + 2, i + 1.
VIVACE_INLINE float reduce_add(F32x16 x) {
#if VIVACE_LEVEL > 0
#if VIVACE_LEVEL >= 2
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v),
                               _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)));
#else
  __m256 eight = _mm256_add_ps(x.lo, x.hi);
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float s[16];
  store(s, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
#endif
}

// The same tree.
VIVACE_INLINE float reduce_max(F32x16 x) {
#if VIVACE_LEVEL > 0
#if VIVACE_LEVEL >= 2
  __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v),
                               _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)));
#else
  __m256 eight = _mm256_max_ps(x.lo, x.hi);
#endif
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float s[16];
  store(s, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] = s[i] > s[i + half] ? s[i] : s[i + half];
  return s[0];
#endif
}

// reduce_add of many vectors by transposition, the same tree. First four vectors become their last
// four partial sums: lanes 4i.. are those of vector i.
VIVACE_INLINE F32x16 fold4(F32x16 a, F32x16 b, F32x16 c, F32x16 d) {
#if VIVACE_LEVEL >= 2
  __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd))};
#elif VIVACE_LEVEL == 1
  __m256 a8 = _mm256_add_ps(a.lo, a.hi), b8 = _mm256_add_ps(b.lo, b.hi);
  __m256 c8 = _mm256_add_ps(c.lo, c.hi), d8 = _mm256_add_ps(d.lo, d.hi);
  return {
      _mm256_add_ps(_mm256_permute2f128_ps(a8, b8, 0x20), _mm256_permute2f128_ps(a8, b8, 0x31)),
      _mm256_add_ps(_mm256_permute2f128_ps(c8, d8, 0x20), _mm256_permute2f128_ps(c8, d8, 0x31))};
#else
  const F32x16 from[4] = {a, b, c, d};
  F32x16 r;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const Float16Lanes& v = from[i].v;
      r.v[4 * i + j] = (v[j] + v[j + 8]) + (v[j + 4] + v[j + 12]);
    }
  return r;
#endif
}

// Then four of these become sums: lane 4i + j is the sum of vector i of fold j.
VIVACE_INLINE F32x16 reduce_folds(F32x16 f0, F32x16 f1, F32x16 f2, F32x16 f3) {
#if VIVACE_LEVEL >= 2
#define VIVACE_FOLD(a, b, low, high) \
  _mm512_add_ps(_mm512_shuffle_ps(a, b, low), _mm512_shuffle_ps(a, b, high))
  __m512 r = VIVACE_FOLD(f0.v, f1.v, 0x44, 0xee), s = VIVACE_FOLD(f2.v, f3.v, 0x44, 0xee);
  return {VIVACE_FOLD(r, s, 0x88, 0xdd)};
#undef VIVACE_FOLD
#elif VIVACE_LEVEL == 1
#define VIVACE_FOLD(a, b, low, high) \
  _mm256_add_ps(_mm256_shuffle_ps(a, b, low), _mm256_shuffle_ps(a, b, high))
  __m256 r = VIVACE_FOLD(f0.lo, f1.lo, 0x44, 0xee), s = VIVACE_FOLD(f2.lo, f3.lo, 0x44, 0xee);
  __m256 t = VIVACE_FOLD(f0.hi, f1.hi, 0x44, 0xee), u = VIVACE_FOLD(f2.hi, f3.hi, 0x44, 0xee);
  return {VIVACE_FOLD(r, s, 0x88, 0xdd), VIVACE_FOLD(t, u, 0x88, 0xdd)};
#undef VIVACE_FOLD
#else
  const F32x16 from[4] = {f0, f1, f2, f3};
  F32x16 r;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const Float16Lanes& v = from[j].v;
      r.v[4 * i + j] = (v[4 * i] + v[4 * i + 2]) + (v[4 * i + 1] + v[4 * i + 3]);
    }
  return r;
#endif
}

// ---------------------------------------------------------------- exp

constexpr float kLowestExp = -87.3f, kHighestExp = 88.37f;

// exp(x) for x between these two. 2^n is put together from integer bits, so every instruction set
// agrees.
VIVACE_INLINE F32x16 exp_inside(F32x16 inside) {
  const F32x16 shift = set1(0x1.8p23f);
  F32x16 shifted = fma(inside, set1(0x1.715476p0f), shift);
  F32x16 n = sub(shifted, shift);
  F32x16 b = fma(n, set1(-0x1.62e4p-1f), inside);
  b = fma(n, set1(-0x1.7f7d1cp-20f), b);
  F32x16 p = set1(0x1.6d4366p-10f);
  p = fma(p, b, set1(0x1.120ba6p-7f));
  p = fma(p, b, set1(0x1.5554e8p-5f));
  p = fma(p, b, set1(0x1.5554dcp-3f));
  p = fma(p, b, set1(0x1p-1f));
  F32x16 j = fma(mul(p, b), b, b);
#if VIVACE_LEVEL >= 2
  F32x16 scale = {_mm512_castsi512_ps(_mm512_add_epi32(
      _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23), _mm512_set1_epi32(0x3f800000)))};
#elif VIVACE_LEVEL == 1
  __m256i one = _mm256_set1_epi32(0x3f800000);
  F32x16 scale = {_mm256_castsi256_ps(_mm256_add_epi32(
                      _mm256_slli_epi32(_mm256_castps_si256(shifted.lo), 23), one)),
                  _mm256_castsi256_ps(_mm256_add_epi32(
                      _mm256_slli_epi32(_mm256_castps_si256(shifted.hi), 23), one))};
#else
  Uint16Lanes raw = (reinterpret_cast<Uint16Lanes>(shifted.v) << 23) + 0x3f800000u;
  F32x16 scale = {reinterpret_cast<Float16Lanes>(raw)};
#endif
  return fma(j, scale, scale);
}

// exp(x), at most 1.1 units in the last place off; exp(0) == 1, 0 below -87.3, infinity
// above 88.37, NaN for NaN.
VIVACE_INLINE F32x16 exp(F32x16 x) {
  const F32x16 lowest = set1(kLowestExp), highest = set1(kHighestExp);
  F32x16 result = exp_inside(min(highest, max(lowest, x)));  // this order keeps a NaN
  result = select(less(x, lowest), zero(), result);
  return select(less(highest, x), set1(infinity()), result);
}

// The same bits for x <= 0 or NaN.
VIVACE_INLINE F32x16 exp_not_above_zero(F32x16 x) {
  const F32x16 lowest = set1(kLowestExp);
  return select(less(x, lowest), zero(), exp_inside(max(lowest, x)));
}

// The same bits for one lane.
VIVACE_INLINE float exp1(float x) {
  float buffer[16];
  store(buffer, exp(set1(x)));
  return buffer[0];
}

// ---------------------------------------------------------------- pairs of bfloat16

VIVACE_INLINE Pairs load_pairs(const uint16_t* p) {
#if VIVACE_LEVEL >= 2
  return {_mm512_loadu_si512(p)};
#elif VIVACE_LEVEL == 1
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16))};
#else
  Pairs r;
  __builtin_memcpy(&r.v, p, 64);
  return r;
#endif
}

// The first n of 32 elements, zeros after them; touches no memory past n.
VIVACE_INLINE Pairs load_pairs_first(const uint16_t* p, int n) {
  uint16_t buffer[32] = {};
  for (int i = 0; i < n; ++i) __builtin_memcpy(buffer + i, p + i, 2);
  return load_pairs(buffer);
}

VIVACE_INLINE void store_pairs(uint16_t* p, Pairs x) {
#if VIVACE_LEVEL >= 2
  _mm512_storeu_si512(p, x.v);
#elif VIVACE_LEVEL == 1
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), x.hi);
#else
  __builtin_memcpy(p, &x.v, 64);
#endif
}

// 32 elements rounded as store_bf16 does.
VIVACE_INLINE Pairs to_pairs(F32x16 first, F32x16 second) {
#if VIVACE_LEVEL >= 4
  return {__builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(second.v, first.v))};
#elif VIVACE_LEVEL >= 2
  return {
      _mm512_inserti64x4(_mm512_castsi256_si512(round_to_bf16(first)), round_to_bf16(second), 1)};
#elif VIVACE_LEVEL == 1
  return {round_to_bf16(first), round_to_bf16(second)};
#else
  uint16_t rounded[32];
  store_bf16(rounded, first);
  store_bf16(rounded + 16, second);
  return load_pairs(rounded);
#endif
}

VIVACE_INLINE F32x16 odd_elements(Pairs a) {
#if VIVACE_LEVEL >= 2
  return {_mm512_castsi512_ps(
      _mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))))};
#elif VIVACE_LEVEL == 1
  __m256i high = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(a.lo, high)),
          _mm256_castsi256_ps(_mm256_and_si256(a.hi, high))};
#else
  return {reinterpret_cast<Float16Lanes>(a.v & 0xffff0000u)};
#endif
}

VIVACE_INLINE F32x16 even_elements(Pairs a) {
#if VIVACE_LEVEL >= 2
  return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))};
#elif VIVACE_LEVEL == 1
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
#else
  return {reinterpret_cast<Float16Lanes>(a.v << 16)};
#endif
}

// acc + a_odd * b_odd, rounded, + a_even * b_even, rounded: what VDPBF16PS computes.
VIVACE_INLINE F32x16 dot_bf16(F32x16 acc, Pairs a, Pairs b) {
#if VIVACE_LEVEL >= 4
  return {_mm512_dpbf16_ps(acc.v, __builtin_bit_cast(__m512bh, a.v),
                           __builtin_bit_cast(__m512bh, b.v))};
#else
  acc = fma(odd_elements(a), odd_elements(b), acc);
  return fma(even_elements(a), even_elements(b), acc);
#endif
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
