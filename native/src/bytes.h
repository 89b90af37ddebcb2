// Vectors of whole numbers: 64 unsigned bytes, 16 sums of 32 bits, and products of codes and
// inputs that are the same whole numbers on every instruction set.
#pragma once

#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

#if VIVACE_LEVEL >= 2
struct Bytes64 {
  __m512i v;
};
struct I32x16 {
  __m512i v;
};
#elif VIVACE_LEVEL == 1
struct Bytes64 {
  __m256i lo, hi;
};
struct I32x16 {
  __m256i lo, hi;
};
#else
typedef uint8_t Byte64Lanes __attribute__((vector_size(64)));
struct Bytes64 {
  Byte64Lanes v;
};
struct I32x16 {
  Int16Lanes v;
};
#endif

VIVACE_INLINE Bytes64 load_bytes(const void* p) {
#if VIVACE_LEVEL >= 2
  return {_mm512_loadu_si512(p)};
#elif VIVACE_LEVEL == 1
  const auto* from = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
#else
  Bytes64 r;
  __builtin_memcpy(&r.v, p, 64);
  return r;
#endif
}

VIVACE_INLINE void store_bytes(void* p, Bytes64 x) {
  __builtin_memcpy(p, &x, 64);
}

// (x >> kShift) & kMask in every byte.
template <int kShift, int kMask>
VIVACE_INLINE Bytes64 bits_at(Bytes64 x) {
#if VIVACE_LEVEL >= 2
  if constexpr (kShift > 0) x.v = _mm512_srli_epi16(x.v, kShift);
  return {_mm512_and_si512(x.v, _mm512_set1_epi8(kMask))};
#elif VIVACE_LEVEL == 1
  const __m256i mask = _mm256_set1_epi8(kMask);
  if constexpr (kShift > 0) {
    x.lo = _mm256_srli_epi16(x.lo, kShift);
    x.hi = _mm256_srli_epi16(x.hi, kShift);
  }
  return {_mm256_and_si256(x.lo, mask), _mm256_and_si256(x.hi, mask)};
#else
  return {(x.v >> kShift) & static_cast<uint8_t>(kMask)};
#endif
}

#if VIVACE_LEVEL >= 3
VIVACE_INLINE Bytes64 masked(Bytes64 x, int mask) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi8(static_cast<char>(mask)))};
}
// (x >> count) & mask in every byte.
VIVACE_INLINE Bytes64 shifted(Bytes64 x, int count, int mask) {
  return masked({reinterpret_cast<__m512i>(reinterpret_cast<__v32hu>(x.v) >> count)}, mask);
}
// x | ((bits >> from) & 1) << to in every byte.
VIVACE_INLINE Bytes64 with_bit(Bytes64 x, Bytes64 bits, int from, int to) {
  const auto words = reinterpret_cast<__v32hu>(bits.v);
  const auto moved =
      reinterpret_cast<__m512i>(from < to ? words << (to - from) : words >> (from - to));
  return {
      _mm512_ternarylogic_epi32(x.v, moved, _mm512_set1_epi8(static_cast<char>(1 << to)), 0xf8)};
}
#endif

// x | ((bits >> kFrom) & 1) << kTo in every byte.
template <int kFrom, int kTo>
VIVACE_INLINE Bytes64 or_bit(Bytes64 x, Bytes64 bits) {
#if VIVACE_LEVEL >= 2
  __m512i moved = bits.v;
  if constexpr (kFrom < kTo) moved = _mm512_slli_epi16(moved, kTo - kFrom);
  if constexpr (kFrom > kTo) moved = _mm512_srli_epi16(moved, kFrom - kTo);
  return {_mm512_ternarylogic_epi32(x.v, moved, _mm512_set1_epi8(1 << kTo), 0xf8)};
#elif VIVACE_LEVEL == 1
  const __m256i mask = _mm256_set1_epi8(1 << kTo);
  const auto move = [&](__m256i v) {
    if constexpr (kFrom < kTo) v = _mm256_slli_epi16(v, kTo - kFrom);
    if constexpr (kFrom > kTo) v = _mm256_srli_epi16(v, kFrom - kTo);
    return _mm256_and_si256(v, mask);
  };
  return {_mm256_or_si256(x.lo, move(bits.lo)), _mm256_or_si256(x.hi, move(bits.hi))};
#else
  return {x.v | ((bits.v >> kFrom) & 1) << kTo};
#endif
}

// x | (bits << kShift), bytes that do not overlap.
template <int kShift>
VIVACE_INLINE Bytes64 or_shifted(Bytes64 x, Bytes64 bits) {
#if VIVACE_LEVEL >= 2
  return {_mm512_or_si512(x.v, _mm512_slli_epi16(bits.v, kShift))};
#elif VIVACE_LEVEL == 1
  return {_mm256_or_si256(x.lo, _mm256_slli_epi16(bits.lo, kShift)),
          _mm256_or_si256(x.hi, _mm256_slli_epi16(bits.hi, kShift))};
#else
  return {x.v | bits.v << kShift};
#endif
}

// Signed bytes plus 128, as unsigned ones.
VIVACE_INLINE Bytes64 to_unsigned(Bytes64 x) {
#if VIVACE_LEVEL >= 2
  return {_mm512_xor_si512(x.v, _mm512_set1_epi8(-128))};
#elif VIVACE_LEVEL == 1
  const __m256i high = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(x.lo, high), _mm256_xor_si256(x.hi, high)};
#else
  return {x.v ^ static_cast<uint8_t>(128)};
#endif
}

// 16 bytes of each of 16 rows, transposed: lane r of out[j] holds bytes 4 j .. 4 j + 3 of row r.
// The first kCount of the four are made.
template <int kCount = 4>
VIVACE_INLINE void transpose_rows(const char* p, size_t stride, Bytes64* out) {
#if VIVACE_LEVEL > 0
  const auto row = [&](int r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + static_cast<size_t>(r) * stride));
  };
#if VIVACE_LEVEL >= 2
  __m512i z[4];
  for (int i = 0; i < 4; ++i) {
    z[i] = _mm512_castsi128_si512(row(i));
    z[i] = _mm512_inserti32x4(z[i], row(4 + i), 1);
    z[i] = _mm512_inserti32x4(z[i], row(8 + i), 2);
    z[i] = _mm512_inserti32x4(z[i], row(12 + i), 3);
  }
  const __m512i low0 = _mm512_unpacklo_epi32(z[0], z[1]), low1 = _mm512_unpacklo_epi32(z[2], z[3]);
  out[0].v = _mm512_unpacklo_epi64(low0, low1);
  if constexpr (kCount == 1) return;
  const __m512i high0 = _mm512_unpackhi_epi32(z[0], z[1]),
                high1 = _mm512_unpackhi_epi32(z[2], z[3]);
  out[1].v = _mm512_unpackhi_epi64(low0, low1);
  out[2].v = _mm512_unpacklo_epi64(high0, high1);
  out[3].v = _mm512_unpackhi_epi64(high0, high1);
#else
  for (int half = 0; half < 2; ++half) {
    __m256i z[4];
    for (int i = 0; i < 4; ++i)
      z[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(8 * half + i)),
                                     row(8 * half + 4 + i), 1);
    const __m256i low0 = _mm256_unpacklo_epi32(z[0], z[1]),
                  low1 = _mm256_unpacklo_epi32(z[2], z[3]);
    const auto set = [&](int j, __m256i v) { (half ? out[j].hi : out[j].lo) = v; };
    set(0, _mm256_unpacklo_epi64(low0, low1));
    if constexpr (kCount == 1) continue;
    const __m256i high0 = _mm256_unpackhi_epi32(z[0], z[1]),
                  high1 = _mm256_unpackhi_epi32(z[2], z[3]);
    set(1, _mm256_unpackhi_epi64(low0, low1));
    set(2, _mm256_unpacklo_epi64(high0, high1));
    set(3, _mm256_unpackhi_epi64(high0, high1));
  }
#endif
#else
  uint8_t bytes[4][64];
  for (int r = 0; r < 16; ++r)
    for (int j = 0; j < kCount; ++j)
      __builtin_memcpy(bytes[j] + 4 * r, p + static_cast<size_t>(r) * stride + 4 * j, 4);
  for (int j = 0; j < kCount; ++j) __builtin_memcpy(&out[j].v, bytes[j], 64);
#endif
}

// ---------------------------------------------------------------- sums of 32 bits

VIVACE_INLINE I32x16 set1_i32(int32_t x) {
#if VIVACE_LEVEL >= 2
  return {_mm512_set1_epi32(x)};
#elif VIVACE_LEVEL == 1
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
#else
  return {Int16Lanes{} + x};
#endif
}

VIVACE_INLINE I32x16 multiply_i32(I32x16 a, I32x16 b) {
#if VIVACE_LEVEL >= 2
  return {_mm512_mullo_epi32(a.v, b.v)};
#elif VIVACE_LEVEL == 1
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
#else
  return {a.v * b.v};
#endif
}

template <int kShift>
VIVACE_INLINE I32x16 shift_left(I32x16 a) {
#if VIVACE_LEVEL >= 2
  return {_mm512_slli_epi32(a.v, kShift)};
#elif VIVACE_LEVEL == 1
  return {_mm256_slli_epi32(a.lo, kShift), _mm256_slli_epi32(a.hi, kShift)};
#else
  return {a.v << kShift};
#endif
}

#if VIVACE_LEVEL >= 3
VIVACE_INLINE I32x16 shift_right(I32x16 a, int count) {
  return {reinterpret_cast<__m512i>(reinterpret_cast<__v16si>(a.v) >> count)};
}
#endif

// 16 bytes as whole numbers.
VIVACE_INLINE I32x16 load_u8(const uint8_t* p) {
#if VIVACE_LEVEL >= 2
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#elif VIVACE_LEVEL == 1
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(raw), _mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8))};
#else
  I32x16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return r;
#endif
}

// (lane >> shift) & mask of vectors whose lanes are 32 bits.
VIVACE_INLINE I32x16 field(Bytes64 x, int shift, int32_t mask) {
#if VIVACE_LEVEL >= 2
  return {
      _mm512_and_si512(_mm512_srl_epi32(x.v, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(mask))};
#elif VIVACE_LEVEL == 1
  const __m128i count = _mm_cvtsi32_si128(shift);
  const __m256i bits = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(_mm256_srl_epi32(x.lo, count), bits),
          _mm256_and_si256(_mm256_srl_epi32(x.hi, count), bits)};
#else
  const Uint16Lanes lanes = reinterpret_cast<Uint16Lanes>(x.v);
  return {reinterpret_cast<Int16Lanes>((lanes >> shift) & static_cast<uint32_t>(mask))};
#endif
}

// The byte at `shift` of each lane, sign and all.
VIVACE_INLINE I32x16 signed_byte(Bytes64 x, int shift) {
#if VIVACE_LEVEL >= 2
  return {_mm512_srai_epi32(_mm512_sll_epi32(x.v, _mm_cvtsi32_si128(24 - shift)), 24)};
#elif VIVACE_LEVEL == 1
  const __m128i count = _mm_cvtsi32_si128(24 - shift);
  return {_mm256_srai_epi32(_mm256_sll_epi32(x.lo, count), 24),
          _mm256_srai_epi32(_mm256_sll_epi32(x.hi, count), 24)};
#else
  const Uint16Lanes lanes = reinterpret_cast<Uint16Lanes>(x.v);
  return {reinterpret_cast<Int16Lanes>(lanes << (24 - shift)) >> 24};
#endif
}

VIVACE_INLINE I32x16 add_i32(I32x16 a, I32x16 b) {
#if VIVACE_LEVEL >= 2
  return {_mm512_add_epi32(a.v, b.v)};
#elif VIVACE_LEVEL == 1
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
#else
  return {a.v + b.v};
#endif
}

VIVACE_INLINE F32x16 to_float(I32x16 a) {
#if VIVACE_LEVEL >= 2
  return {_mm512_cvtepi32_ps(a.v)};
#elif VIVACE_LEVEL == 1
  return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
#else
  return {__builtin_convertvector(a.v, Float16Lanes)};
#endif
}

// Lanes as the bits of floats.
VIVACE_INLINE F32x16 bits_to_float(I32x16 a) {
#if VIVACE_LEVEL >= 2
  return {_mm512_castsi512_ps(a.v)};
#elif VIVACE_LEVEL == 1
  return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
#else
  return {reinterpret_cast<Float16Lanes>(a.v)};
#endif
}

// The float16 in the low (high) half of each lane.
VIVACE_INLINE F32x16 low_halves(Bytes64 x, bool high) {
#if VIVACE_LEVEL >= 2
  const __m512i lanes = high ? _mm512_srli_epi32(x.v, 16) : x.v;
  return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(lanes))};
#else
  uint32_t lanes[16];
  __builtin_memcpy(lanes, &x, 64);
  uint16_t halves[16];
  for (int i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(high ? lanes[i] >> 16 : lanes[i]);
  return load_f16(halves);
#endif
}

// ---------------------------------------------------------------- products

#if VIVACE_LEVEL == 1 || VIVACE_LEVEL == 2
#if VIVACE_LEVEL == 2
using Lanes = __m512i;
#define VIVACE_M(name) _mm512_##name
#else
using Lanes = __m256i;
#define VIVACE_M(name) _mm256_##name
#endif

// Pairs of products are added in 16 bits as far as they fit: kMaxCode * 127 * 2 * chain < 2^15;
// larger codes are taken apart into halves.
template <int kCount, int kMaxCode>
VIVACE_INLINE Lanes dot_pairs(Lanes sum, const Lanes* codes, const int8_t* x) {
  const auto input = [&](int j) {
    int32_t four;
    __builtin_memcpy(&four, x + 4 * j, 4);
    return VIVACE_M(set1_epi32)(four);
  };
  const auto take = [&](Lanes pairs, int16_t weight) {
    sum = VIVACE_M(add_epi32)(sum, VIVACE_M(madd_epi16)(pairs, VIVACE_M(set1_epi16)(weight)));
  };
  if constexpr (kMaxCode <= 63) {
    constexpr int kChain = kMaxCode <= 15 ? 8 : kMaxCode <= 31 ? 4 : 2;
    VIVACE_UNROLL
    for (int first = 0; first < kCount; first += kChain) {
      Lanes pairs = VIVACE_M(maddubs_epi16)(codes[first], input(first));
      for (int j = first + 1; j < first + kChain && j < kCount; ++j)
        pairs = VIVACE_M(add_epi16)(pairs, VIVACE_M(maddubs_epi16)(codes[j], input(j)));
      take(pairs, 1);
    }
  } else {
    const Lanes mask = VIVACE_M(set1_epi8)(15);
    Lanes low = VIVACE_M(set1_epi8)(0), high = low;
    VIVACE_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const Lanes lower = codes[j] & mask, upper = VIVACE_M(srli_epi16)(codes[j], 4) & mask;
      low = VIVACE_M(add_epi16)(low, VIVACE_M(maddubs_epi16)(lower, input(j)));
      high = VIVACE_M(add_epi16)(high, VIVACE_M(maddubs_epi16)(upper, input(j)));
    }
    take(low, 1);
    take(high, 16);
  }
  return sum;
}
#undef VIVACE_M
#endif

// sums[r] + codes[j] . x[4 j .. 4 j + 3] over kCount vectors, where x = input(r), for T rows; lanes
// are outputs. No code is above kMaxCode, inputs are -127..127.
template <int T, int kCount, int kMaxCode, class Input>
VIVACE_INLINE void dot(I32x16* sums, const Bytes64* codes, Input input) {
#if VIVACE_LEVEL >= 3
  VIVACE_UNROLL
  for (int r = 0; r < T; ++r) {
    const int8_t* x = input(r);
    VIVACE_UNROLL
    for (int j = 0; j < kCount; ++j) {
      int32_t four;
      __builtin_memcpy(&four, x + 4 * j, 4);
      sums[r].v = _mm512_dpbusd_epi32(sums[r].v, codes[j].v, _mm512_set1_epi32(four));
    }
  }
#elif VIVACE_LEVEL == 2
  Lanes lanes[kCount];
  for (int j = 0; j < kCount; ++j) lanes[j] = codes[j].v;
  VIVACE_UNROLL
  for (int r = 0; r < T; ++r) sums[r].v = dot_pairs<kCount, kMaxCode>(sums[r].v, lanes, input(r));
#elif VIVACE_LEVEL == 1
  Lanes half[kCount];  // eight outputs at a time: their codes fit the registers
  for (int j = 0; j < kCount; ++j) half[j] = codes[j].lo;
  VIVACE_UNROLL
  for (int r = 0; r < T; ++r) sums[r].lo = dot_pairs<kCount, kMaxCode>(sums[r].lo, half, input(r));
  for (int j = 0; j < kCount; ++j) half[j] = codes[j].hi;
  VIVACE_UNROLL
  for (int r = 0; r < T; ++r) sums[r].hi = dot_pairs<kCount, kMaxCode>(sums[r].hi, half, input(r));
#else
  for (int r = 0; r < T; ++r)
    for (int j = 0; j < kCount; ++j)
      for (int i = 0; i < 4; ++i) {
        Int16Lanes code;
        for (int o = 0; o < 16; ++o) code[o] = codes[j].v[4 * o + i];
        sums[r].v += code * input(r)[4 * j + i];
      }
#endif
}

// Whole numbers nearest to floats of a magnitude below 2^22, ties to even.
VIVACE_INLINE I32x16 round_to_i32(F32x16 x) {
#if VIVACE_LEVEL >= 2
  return {_mm512_cvtps_epi32(x.v)};
#elif VIVACE_LEVEL == 1
  return {_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi)};
#else
  const Float16Lanes shifted = x.v + 0x1.8p23f;
  return {reinterpret_cast<Int16Lanes>(shifted) - static_cast<int32_t>(0x4b400000)};
#endif
}

// The low byte of each lane.
VIVACE_INLINE void store_low_bytes(int8_t* p, I32x16 x) {
#if VIVACE_LEVEL >= 2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
#else
  int32_t lanes[16];
  __builtin_memcpy(lanes, &x, 64);
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
#endif
}

// The larger of the bits of |x|, as whole numbers: NaN is above infinity is above all others.
VIVACE_INLINE I32x16 max_magnitude(I32x16 a, F32x16 x) {
  const F32x16 size = abs(x);
#if VIVACE_LEVEL >= 2
  return {_mm512_max_epi32(a.v, _mm512_castps_si512(size.v))};
#elif VIVACE_LEVEL == 1
  return {_mm256_max_epi32(a.lo, _mm256_castps_si256(size.lo)),
          _mm256_max_epi32(a.hi, _mm256_castps_si256(size.hi))};
#else
  const Int16Lanes bits = reinterpret_cast<Int16Lanes>(size.v);
  return {a.v > bits ? a.v : bits};
#endif
}

VIVACE_INLINE int32_t reduce_max_i32(I32x16 x) {
#if VIVACE_LEVEL >= 2
  return _mm512_reduce_max_epi32(x.v);
#else
  int32_t lanes[16];
  __builtin_memcpy(lanes, &x, 64);
  int32_t most = lanes[0];
  for (int i = 1; i < 16; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
#endif
}

VIVACE_INLINE int32_t reduce_add_i32(I32x16 x) {
#if VIVACE_LEVEL >= 2
  return _mm512_reduce_add_epi32(x.v);
#else
  int32_t lanes[16];
  __builtin_memcpy(lanes, &x, 64);
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  return sum;
#endif
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
