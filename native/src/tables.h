// Tables of 8, 16 or 64 bfloat16 values, and codes looked up in them 32 at a time.
//
// A table is scaled once for the weights that share a scale, so a weight costs a look-up alone.
#pragma once

#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

// 32 codes at `p`, laid out as format.h says, in order: words on AVX-512, else bytes. Bits above a
// code's own may be anything where look_up() ignores them.
#if VIVACE_LEVEL >= 2
using CodeVector = __m512i;
#elif VIVACE_LEVEL == 1
using CodeVector = __m256i;
#else
struct CodeVector {
  uint8_t at[32];
};
#endif

template <int kBits>
constexpr int kStepBytes = 4 * kBits;

#if VIVACE_LEVEL >= 2
// Byte i % 8 + 8 (q & 1) of 16 at word i of each quarter q; moved up by 8 if kHigh.
template <int kUsed, bool kHigh>
VIVACE_INLINE __m512i spread(__m512i bytes) {
  alignas(64) static constexpr auto kPlaces = [] {
    struct {
      uint8_t at[64];
    } places{};
    for (int i = 0; i < 64; ++i) {
      const int byte = i / 2 % 8 + (kUsed == 16 ? i / 16 % 2 * 8 : 0);
      places.at[i] = i % 2 == kHigh ? byte : 0x80;
    }
    return places;
  }();
  return _mm512_shuffle_epi8(bytes, _mm512_load_si512(&kPlaces));
}

// Shifts all words of quarter q right by kFirst + q * kStep.
template <int kFirst, int kStep>
VIVACE_INLINE __m512i shift_quarters(__m512i words) {
  constexpr auto four = [](int shift) { return 0x0001000100010001LL * shift; };
  constexpr long long a = four(kFirst), b = four(kFirst + kStep), c = four(kFirst + 2 * kStep),
                      d = four(kFirst + 3 * kStep);
  return _mm512_srlv_epi16(words, _mm512_setr_epi64(a, a, b, b, c, c, d, d));
}

VIVACE_INLINE __m512i load_nibbles(const uint8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m512i words = spread<16, false>(_mm512_broadcast_i32x4(raw));
  return _mm512_srlv_epi16(words,
                           _mm512_setr_epi64(0, 0, 0, 0, 0x0004000400040004, 0x0004000400040004,
                                             0x0004000400040004, 0x0004000400040004));
}

VIVACE_INLINE __m512i load_eight(const uint8_t* p) {
  long long raw;
  __builtin_memcpy(&raw, p, 8);
  return _mm512_set1_epi64(raw);
}

template <int kBits>
VIVACE_INLINE CodeVector load_codes(const uint8_t* p) {
  if constexpr (kBits == 4) return load_nibbles(p);
  if constexpr (kBits == 3) {
    uint32_t third;
    __builtin_memcpy(&third, p + 8, 4);
    const __m512i pairs = shift_quarters<0, 2>(spread<8, false>(load_eight(p)));
    const __m512i low = _mm512_and_si512(pairs, _mm512_set1_epi16(3));
    return _mm512_mask_add_epi16(low, third, low, _mm512_set1_epi16(4));
  }
  const __m512i pairs = shift_quarters<4, 2>(spread<8, true>(load_eight(p + 16)));
  return _mm512_ternarylogic_epi32(load_nibbles(p), pairs, _mm512_set1_epi16(15), 0xe4);
}
#elif VIVACE_LEVEL == 1
VIVACE_INLINE __m256i load_nibbles(const uint8_t* p) {
  const __m256i raw =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i shifted = _mm256_srlv_epi32(raw, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(15));
}

// Bits 2 q, 2 q + 1 of eight bytes in each quarter q.
VIVACE_INLINE __m256i load_pairs_of_bits(const uint8_t* p) {
  long long raw;
  __builtin_memcpy(&raw, p, 8);
  const __m256i shifted =
      _mm256_srlv_epi64(_mm256_set1_epi64x(raw), _mm256_setr_epi64x(0, 2, 4, 6));
  return _mm256_and_si256(shifted, _mm256_set1_epi8(3));
}

template <int kBits>
VIVACE_INLINE CodeVector load_codes(const uint8_t* p) {
  if constexpr (kBits == 4) return load_nibbles(p);
  if constexpr (kBits == 3) {
    int third;
    __builtin_memcpy(&third, p + 8, 4);
    const __m256i place =
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(third), place);
    const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    return _mm256_or_si256(load_pairs_of_bits(p), _mm256_and_si256(is_set, _mm256_set1_epi8(4)));
  }
  return _mm256_or_si256(load_nibbles(p), _mm256_slli_epi16(load_pairs_of_bits(p + 16), 4));
}
#else
template <int kBits>
VIVACE_INLINE CodeVector load_codes(const uint8_t* p) {
  CodeVector codes;
  for (int i = 0; i < 32; ++i) {
    const int nibble = p[i % 16] >> (i / 16 * 4) & 15;
    const int pair = p[(kBits == 6 ? 16 : 0) + i % 8] >> (i / 8 * 2) & 3;
    const int third = kBits == 3 ? p[8 + i / 8] >> (i % 8) & 1 : 0;
    const int code = kBits == 4 ? nibble : kBits == 3 ? pair | third << 2 : nibble | pair << 4;
    codes.at[i] = static_cast<uint8_t>(code);
  }
  return codes;
}
#endif

// 16 values (of 8, the first ones) for each half of 32 weights, or 64 for all of them.
template <int kBits>
struct Table {
  static constexpr int kVectors = kBits == 6 ? 4 : 1;
#if VIVACE_LEVEL >= 2
  __m512i at[kBits == 6 ? 2 : 1];
#elif VIVACE_LEVEL == 1
  __m256i low[kVectors], high[kVectors];  // bytes of 16 values, in each half
#else
  uint16_t at[2][16 * kVectors];
#endif
};

// `first` and `second` [Table::kVectors] are the halves' values, the same for 64 values.
template <int kBits>
VIVACE_INLINE Table<kBits> make_table(const F32x16* first, const F32x16* second) {
  Table<kBits> table;
#if VIVACE_LEVEL >= 2
  if constexpr (kBits == 6) {
    table.at[0] = to_pairs(first[0], first[1]).v;
    table.at[1] = to_pairs(first[2], first[3]).v;
  } else {
    table.at[0] = to_pairs(first[0], second[0]).v;
  }
#elif VIVACE_LEVEL == 1
  const __m256i mask = _mm256_set1_epi16(255);
  for (int i = 0; i < Table<kBits>::kVectors; ++i) {
    const __m256i a = round_to_bf16(first[i]);
    const __m256i b = first == second ? a : round_to_bf16(second[i]);
    const __m256i low = _mm256_packus_epi16(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    table.low[i] = _mm256_permute4x64_epi64(low, 0xd8);
    table.high[i] = _mm256_permute4x64_epi64(high, 0xd8);
  }
#else
  for (int i = 0; i < Table<kBits>::kVectors; ++i) {
    store_bf16(table.at[0] + 16 * i, first[i]);
    store_bf16(table.at[1] + 16 * i, second[i]);
  }
#endif
  return table;
}

// kHalves: the halves of the table differ.
template <int kBits, bool kHalves>
VIVACE_INLINE Pairs look_up(const Table<kBits>& table, CodeVector codes) {
#if VIVACE_LEVEL >= 2
  if constexpr (kBits == 6) return {_mm512_permutex2var_epi16(table.at[0], codes, table.at[1])};
  if constexpr (kHalves) {
    constexpr long long k16 = 0x0010001000100010;
    codes = _mm512_ternarylogic_epi32(codes, _mm512_setr_epi64(0, 0, 0, 0, k16, k16, k16, k16),
                                      _mm512_set1_epi16(15), 0xe4);
  }
  return {_mm512_permutexvar_epi16(codes, table.at[0])};
#elif VIVACE_LEVEL == 1
  __m256i low = _mm256_setzero_si256(), high = low;
  if constexpr (kBits == 6) {
    VIVACE_UNROLL
    for (int i = 0; i < 4; ++i) {
      // Codes of the other three quarters get the high bit, for which a shuffle gives zero.
      const __m256i own = _mm256_adds_epu8(_mm256_sub_epi8(codes, _mm256_set1_epi8(16 * i)),
                                           _mm256_set1_epi8(0x70));
      low = _mm256_or_si256(low, _mm256_shuffle_epi8(table.low[i], own));
      high = _mm256_or_si256(high, _mm256_shuffle_epi8(table.high[i], own));
    }
  } else {
    low = _mm256_shuffle_epi8(table.low[0], codes);
    high = _mm256_shuffle_epi8(table.high[0], codes);
  }
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
#else
  uint16_t out[32];
  for (int i = 0; i < 32; ++i) out[i] = table.at[i / 16][codes.at[i]];
  return load_pairs(out);
#endif
}

// Floats of 8 bits as float16: e5m2 are the high bytes of float16; e4m3 have its exponent's bits
// moved down, 2^8 too small, and codes of NaN as 480.
#if VIVACE_LEVEL >= 2
template <bool kIsE4m3>
VIVACE_INLINE __m512i widen_words(__m512i words) {
  const __m512i high = _mm512_slli_epi16(words, 8);
  if constexpr (!kIsE4m3) return high;
  return _mm512_and_si512(_mm512_srai_epi16(high, 1),
                          _mm512_set1_epi16(static_cast<short>(0xbf80)));
}
#elif VIVACE_LEVEL == 1
template <bool kIsE4m3>
VIVACE_INLINE F32x16 widen_half(const uint8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  __m256i words = _mm256_slli_epi16(_mm256_cvtepu8_epi16(raw), 8);
  if constexpr (kIsE4m3)
    words = _mm256_and_si256(_mm256_srai_epi16(words, 1),
                             _mm256_set1_epi16(static_cast<short>(0xbf80)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(words)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1))};
}
#endif

// 32 floats of 8 bits, times `scale`.
template <bool kIsE4m3>
VIVACE_INLINE Pairs widen_bytes(const uint8_t* p, float scale) {
  const F32x16 factor = set1(kIsE4m3 ? scale * 256.0f : scale);
#if VIVACE_LEVEL >= 2
  const __m512i words = widen_words<kIsE4m3>(
      _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  const F32x16 first = {_mm512_cvtph_ps(_mm512_castsi512_si256(words))};
  const F32x16 second = {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
#elif VIVACE_LEVEL == 1
  const F32x16 first = widen_half<kIsE4m3>(p), second = widen_half<kIsE4m3>(p + 16);
#else
  uint16_t halves[32];
  for (int i = 0; i < 32; ++i) {
    const uint32_t code = p[i], e4m3 = (code & 0x80) << 8 | (code & 0x7f) << 7;
    halves[i] = static_cast<uint16_t>(kIsE4m3 ? e4m3 : code << 8);
  }
  const F32x16 first = load_f16(halves), second = load_f16(halves + 16);
#endif
  return to_pairs(mul(first, factor), mul(second, factor));
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
