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

// f of each vector that x is made of, and of those of others.
template <class F, class... Others>
VIVACE_INLINE Bytes64 each_vector(F f, Bytes64 x, Others... others) {
#if VIVACE_LEVEL == 1
  return {f(x.lo, others.lo...), f(x.hi, others.hi...)};
#else
  return {f(x.v, others.v...)};
#endif
}

// Bytes as words of 16 bits, which can be shifted: what then comes from a neighbour is masked.
template <class Vector>
struct WordsOf {
  typedef uint16_t Type __attribute__((vector_size(sizeof(Vector))));
};
template <class Vector>
VIVACE_INLINE auto words_of(Vector x) {
  return reinterpret_cast<typename WordsOf<Vector>::Type>(x);
}

// (x >> shift) & mask in every byte.
VIVACE_INLINE Bytes64 bits_at(Bytes64 x, int shift, int mask) {
  const auto both = static_cast<uint16_t>(mask * 0x101);
  return each_vector(
      [=](auto v) { return reinterpret_cast<decltype(v)>((words_of(v) >> shift) & both); }, x);
}

// x | ((bits >> from) & 1) << to in every byte.
VIVACE_INLINE Bytes64 or_bit(Bytes64 x, Bytes64 bits, int from, int to) {
  const auto both = static_cast<uint16_t>((1 << to) * 0x101);
  return each_vector(
      [=](auto v, auto other) {
        const auto words = words_of(other);
        const auto moved = from < to ? words << (to - from) : words >> (from - to);
        return reinterpret_cast<decltype(v)>(words_of(v) | (moved & both));
      },
      x, bits);
}

// x | bits << shift in every byte, where these do not overlap.
VIVACE_INLINE Bytes64 or_shifted(Bytes64 x, Bytes64 bits, int shift) {
  return each_vector(
      [=](auto v, auto other) {
        return reinterpret_cast<decltype(v)>(words_of(v) | words_of(other) << shift);
      },
      x, bits);
}

// Signed bytes plus 128, as unsigned ones.
VIVACE_INLINE Bytes64 to_unsigned(Bytes64 x) {
  return each_vector(
      [](auto v) {
        return reinterpret_cast<decltype(v)>(words_of(v) ^ static_cast<uint16_t>(0x8080));
      },
      x);
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

VIVACE_INLINE int32_t four_bytes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  return four;
}

#if VIVACE_LEVEL == 1 || VIVACE_LEVEL == 2
#if VIVACE_LEVEL == 2
using Lanes = __m512i;
#define VIVACE_M(name) _mm512_##name
#else
using Lanes = __m256i;
#define VIVACE_M(name) _mm256_##name
#endif

// Sums of pairs of products in 16 bits, which hold kTerms of them: kMaxCode * 127 * 2 * kTerms <
// 2^15. Larger codes are taken apart into halves.
template <int kMaxCode>
struct PairSums {
  static constexpr bool kHasHalves = kMaxCode > 63;
  static constexpr int kTerms = kHasHalves || kMaxCode <= 15 ? 8 : kMaxCode <= 31 ? 4 : 2;
  Lanes low = VIVACE_M(set1_epi8)(0), high = low;

  VIVACE_MEMBER void take(Lanes codes, Lanes x) {
    if constexpr (kHasHalves) {
      const Lanes mask = VIVACE_M(set1_epi8)(15);
      add(low, codes & mask, x);
      add(high, VIVACE_M(srli_epi16)(codes, 4) & mask, x);
    } else {
      add(low, codes, x);
    }
  }
  VIVACE_MEMBER Lanes plus(Lanes sum) const {
    sum = VIVACE_M(add_epi32)(sum, VIVACE_M(madd_epi16)(low, VIVACE_M(set1_epi16)(1)));
    if constexpr (kHasHalves)
      sum = VIVACE_M(add_epi32)(sum, VIVACE_M(madd_epi16)(high, VIVACE_M(set1_epi16)(16)));
    return sum;
  }

 private:
  VIVACE_MEMBER static void add(Lanes& sum, Lanes codes, Lanes x) {
    sum = VIVACE_M(add_epi16)(sum, VIVACE_M(maddubs_epi16)(codes, x));
    __asm__("" : "+v"(sum));  // in this order: else all products are made first, and kept in memory
  }
};

#if VIVACE_LEVEL == 2
VIVACE_INLINE Lanes& lanes_of(I32x16& x, int) {
  return x.v;
}
VIVACE_INLINE Lanes lanes_of(const Bytes64& x, int) {
  return x.v;
}
#else
VIVACE_INLINE Lanes& lanes_of(I32x16& x, int half) {
  return half == 0 ? x.lo : x.hi;
}
VIVACE_INLINE Lanes lanes_of(const Bytes64& x, int half) {
  return half == 0 ? x.lo : x.hi;
}
#endif

// dot() for lanes [kFrom, kTo).
template <int T, int kCount, int kMaxCode, int kFrom, int kTo, class Codes, class Input>
VIVACE_INLINE void dot_lanes(I32x16* sums, Codes codes, Input input) {
  using Sums16 = PairSums<kMaxCode>;
  static_assert(kCount % Sums16::kTerms == 0 || kCount < Sums16::kTerms);
  constexpr int kTerms = kCount < Sums16::kTerms ? kCount : Sums16::kTerms;
  VIVACE_UNROLL
  for (int first = 0; first < kCount; first += kTerms) {
    Sums16 pairs[T][kTo - kFrom];
    VIVACE_UNROLL
    for (int i = 0; i < kTerms; ++i) {
      const int j = first + i;
      const Bytes64 code = codes(j);
      VIVACE_UNROLL
      for (int r = 0; r < T; ++r) {
        const Lanes x = VIVACE_M(set1_epi32)(four_bytes(input(r) + 4 * j));
        VIVACE_UNROLL
        for (int h = kFrom; h < kTo; ++h) pairs[r][h - kFrom].take(lanes_of(code, h), x);
      }
    }
    VIVACE_UNROLL
    for (int r = 0; r < T; ++r) VIVACE_UNROLL
    for (int h = kFrom; h < kTo; ++h) {
      Lanes& sum = lanes_of(sums[r], h);
      sum = pairs[r][h - kFrom].plus(sum);
    }
  }
}
#undef VIVACE_M
#endif

#if VIVACE_LEVEL >= 3
VIVACE_INLINE I32x16 shift_right(I32x16 a, int count) {
  return {reinterpret_cast<__m512i>(reinterpret_cast<__v16si>(a.v) >> count)};
}

// sum + codes . x[0 .. 3].
VIVACE_INLINE I32x16 dot_bytes(I32x16 sum, Bytes64 codes, const int8_t* x) {
  return {_mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(four_bytes(x)))};
}
#endif

// sums[r] + codes(j) . x[4 j .. 4 j + 3] over kCount vectors, where x = input(r), for T rows; lanes
// are outputs. No code is above kMaxCode, inputs are -127..127.
template <int T, int kCount, int kMaxCode, class Codes, class Input>
VIVACE_INLINE void dot(I32x16* sums, Codes codes, Input input) {
#if VIVACE_LEVEL >= 3
  Bytes64 all[kCount];
  VIVACE_UNROLL
  for (int j = 0; j < kCount; ++j) all[j] = codes(j);
  VIVACE_UNROLL
  for (int r = 0; r < T; ++r) VIVACE_UNROLL
  for (int j = 0; j < kCount; ++j) sums[r] = dot_bytes(sums[r], all[j], input(r) + 4 * j);
#elif VIVACE_LEVEL == 2
  dot_lanes<T, kCount, kMaxCode, 0, 1>(sums, codes, input);
#elif VIVACE_LEVEL == 1
  if constexpr (PairSums<kMaxCode>::kHasHalves) {  // else there are too few registers
    dot_lanes<T, kCount, kMaxCode, 0, 1>(sums, codes, input);
    dot_lanes<T, kCount, kMaxCode, 1, 2>(sums, codes, input);
  } else {
    dot_lanes<T, kCount, kMaxCode, 0, 2>(sums, codes, input);
  }
#else
  for (int j = 0; j < kCount; ++j) {
    const Bytes64 code = codes(j);
    for (int i = 0; i < 4; ++i) {
      Int16Lanes lanes;
      for (int o = 0; o < 16; ++o) lanes[o] = code.v[4 * o + i];
      for (int r = 0; r < T; ++r) sums[r].v += lanes * input(r)[4 * j + i];
    }
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
