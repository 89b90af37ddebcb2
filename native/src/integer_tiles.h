// Rows of inputs rounded to 8 bits, and how a few at a time meet a unit of codes.
#pragma once

#include "integer_sources.h"

namespace vivace::VIVACE_ISA {
namespace {

// Brings what comes next into the second-level cache, a share with every step.
struct Ahead {
  const char* from;
  size_t at, until;  // bytes that are asked for, and to be so by the end of a step
  size_t per_step;   // 0: there is nothing to bring

  VIVACE_MEMBER void advance() {
    until += per_step;
    for (; at < until; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

struct Tile {
  int32_t K, input_group;
  Int8Layout input;
  const char* x;
  size_t x_stride;
  const float* bias;
  float* y;
  int64_t ldy;
  int outputs;
  Ahead ahead;
  int from_step, to_step;  // of a unit
  float* partial;          // [rows][a unit's outputs]: sums of the steps before
  const char* bring;       // what a unit's steps bring meanwhile, or null
};

// The prepared rows of a tile. Few registers hold where they are: offsets are made of multiples of
// the stride by the processor's addressing, which `forget` keeps the compiler from undoing.
struct TileRows {
  const char *codes, *scales, *products;
  size_t one, three, five, seven;  // strides

  TileRows(const Tile& tile)
      : codes(tile.x),
        scales(tile.x + tile.input.scales_at),
        products(tile.x + tile.input.products_at),
        one(tile.x_stride),
        three(3 * tile.x_stride),
        five(5 * tile.x_stride),
        seven(7 * tile.x_stride) {}

  template <int T>
  VIVACE_MEMBER void forget() {
    __asm__("" : "+r"(one));
    if constexpr (T > 3) __asm__("" : "+r"(three));
    if constexpr (T > 5) __asm__("" : "+r"(five));
    if constexpr (T > 7) __asm__("" : "+r"(seven));
  }
  VIVACE_MEMBER size_t offset(int r) const {
    switch (r) {
      case 0:
        return 0;
      case 1:
        return one;
      case 2:
        return 2 * one;
      case 3:
        return three;
      case 4:
        return 4 * one;
      case 5:
        return five;
      case 6:
        return 2 * three;
      default:
        return seven;
    }
  }
  VIVACE_MEMBER const int8_t* input(int r, int step) const {
    return reinterpret_cast<const int8_t*>(codes + 32 * static_cast<size_t>(step) + offset(r));
  }
  VIVACE_MEMBER const InputScale& scale(int r, int group) const {
    return reinterpret_cast<const InputScale*>(scales + offset(r))[group];
  }
  VIVACE_MEMBER float product(int r, int group) const {
    return reinterpret_cast<const float*>(products + offset(r))[group];
  }
};

// How many tiles, one after the other, share the bringing of what follows.
template <int kBits>
constexpr int kBringing = kBits == 2 ? 1 : 2;

// Tiles of two rows lose by the question alone whether there is anything, of 3 bits or without
// VNNI.
template <int kBits, int T>
constexpr bool kBrings = T > (kBits == 3 || VIVACE_LEVEL < 3 ? 2 : 1);

// Asks for one line, beside each of some loads: all at once would wait for each other.
VIVACE_INLINE void bring_line(const char*& p) {
  if (p == nullptr) return;
  __builtin_prefetch(p, 0, 2);
  p += 64;
}

// The products of a step's codes, from `at` on, for P panels.
template <int kBits, int T, int P, int kSums, class Input>
VIVACE_INLINE void dot_unit(I32x16 (*sums)[T][kSums], const uint8_t* at, const char*& bring,
                            Input input) {
#if VIVACE_LEVEL >= 3
  constexpr int kPlace = kPlaceBits<kBits>, kPlaces = 8 / kPlace, kMask = (1 << kPlace) - 1;
  VIVACE_UNROLL
  for (int v = 0; v < kPlace; ++v) VIVACE_UNROLL
  for (int p = 0; p < P; ++p) {
    Bytes64 raw = load_bytes(at + (v * kPanels + p) * 64);
    __asm__("" : "+v"(raw.v));  // keeps it in a register: loads are scarce
    // The vectors of third bits are asked for with the first ones.
    if (kBrings<kBits, T> && (p % kBringing<kBits> == 0 || (kBits == 3 && v == 0)))
      bring_line(bring);
    VIVACE_UNROLL
    for (int i = 0; i < kPlaces; ++i) {
      const int j = v + kPlace * i;
      const Bytes64 code = kSums > 1 ? bits_at(raw, 0, kMask << kPlace * i)
                                     : code_of<kBits>(raw, at + (kPlace * kPanels + p) * 64, j);
      VIVACE_UNROLL
      for (int r = 0; r < T; ++r) {
        I32x16& sum = sums[p][r][kSums > 1 ? i : 0];
        sum = dot_bytes(sum, code, input(r) + 4 * j);
      }
    }
  }
#else
  static_assert(P == 1 && kSums == 1);
  for (int i = 0; kBrings<kBits, T> && i < kBits; i += kBringing<kBits>) bring_line(bring);
  dot<T, 8, (1 << kBits) - 1>(
      reinterpret_cast<I32x16*>(sums), [&](int j) { return code_at<kBits>(at, j); }, input);
#endif
}

// A few rows times a unit of codes: what decoding does most, so with as few instructions a byte as
// can be. Where the registers suffice, codes are multiplied where they lie in their bytes: sums of
// those in upper bits are multiples of their place, and shifted down at a group's end. kIsUsual:
// groups of 32 with float16 scales.
template <int kBits, bool kIsUsual, int T>
[[gnu::noinline]] void multiply_unit(const Format& format, const void* unit, const Tile& tile) {
  constexpr int kPlaces = 8 / kPlaceBits<kBits>;  // of codes in a byte
  // A sum for each place?
  constexpr int kSums = VIVACE_LEVEL >= 3 && kBits != 3 && T * kPlaces <= 4 ? kPlaces : 1;
  constexpr int P = VIVACE_LEVEL < 3 ? 1 : kBits > 2 || T <= 2 ? kPanels : 2;  // panels at once
  const ScaleType scale_type = kIsUsual ? ScaleType::float16 : format.scale;
  const bool has_zeros = !kIsUsual && format.has_zeros, is_row = !kIsUsual && format.group == 0;
  const CodesLayout layout = codes_layout(format, tile.K);
  const size_t scale_stride = kPanelOutputs * scale_bytes(scale_type);
  TileRows rows(tile);
  const auto* first = static_cast<const uint8_t*>(unit);
  const int num_steps = (tile.K + kStepInputs - 1) / kStepInputs;
  const int steps_per_group = kIsUsual ? 1 : tile.input_group / kStepInputs;
  int step = tile.from_step, group = step / steps_per_group;
  const uint8_t* group_at = first + static_cast<size_t>(step) * kPanels * kBits * 64 +
                            (is_row ? group > 0 : group) * layout.codes_at;
  F32x16 acc[kPanels][T];
  VIVACE_UNROLL
  for (int p = 0; p < kPanels; ++p) VIVACE_UNROLL
  for (int r = 0; r < T; ++r)
    acc[p][r] = step == 0 ? zero() : load(tile.partial + (r * kPanels + p) * kPanelOutputs);
  const char* bring = tile.bring;
  for (; step < tile.to_step; ++group) {
    if (kBrings<kBits, T>) bring_line(bring);
    const size_t head = is_row && group > 0 ? 0 : layout.codes_at;
    const uint8_t* zeros = (is_row ? first : group_at) + layout.zeros_at;
    const int count =
        kIsUsual || steps_per_group < num_steps - step ? steps_per_group : num_steps - step;
    rows.template forget<T>();
    VIVACE_UNROLL
    for (int half = 0; half < kPanels; half += P) {
      I32x16 sums[P][T][kSums];
      VIVACE_UNROLL
      for (int p = 0; p < P; ++p) VIVACE_UNROLL
      for (int r = 0; r < T; ++r) {
        sums[p][r][0] = set1_i32(rows.scale(r, group).offset);
        if (has_zeros)
          sums[p][r][0] = multiply_i32(sums[p][r][0], load_u8(zeros + (half + p) * kPanelOutputs));
        VIVACE_UNROLL
        for (int i = 1; i < kSums; ++i) sums[p][r][i] = set1_i32(0);
      }
      const uint8_t* at = group_at + head + half * 64;
      for (int s = 0; s < count; ++s, at += kPanels * kBits * 64) {
        dot_unit<kBits, T, P, kSums>(sums, at, bring,
                                     [&](int r) { return rows.input(r, step + s); });
      }
      VIVACE_UNROLL
      for (int p = 0; p < P; ++p) {
        const F32x16 scale =
            is_row ? set1(1.0f) : load_scales(scale_type, group_at + (half + p) * scale_stride);
        VIVACE_UNROLL
        for (int r = 0; r < T; ++r) {
          I32x16 sum = sums[p][r][0];
#if VIVACE_LEVEL >= 3
          VIVACE_UNROLL
          for (int i = 1; i < kSums; ++i)
            sum = add_i32(sum, shift_right(sums[p][r][i], kPlaceBits<kBits> * i));
#endif
          acc[half + p][r] =
              fma(to_float(sum), mul(scale, set1(rows.scale(r, group).scale)), acc[half + p][r]);
        }
      }
    }
    step += count;
    group_at += head + static_cast<size_t>(count) * kPanels * kBits * 64;
  }
  VIVACE_UNROLL
  for (int p = 0; p < kPanels; ++p) {
    const F32x16 scale = is_row ? load_scales(scale_type, first + p * scale_stride) : set1(1.0f);
    VIVACE_UNROLL
    for (int r = 0; r < T; ++r) {
      if (step < num_steps) {
        store(tile.partial + (r * kPanels + p) * kPanelOutputs, acc[p][r]);
        continue;
      }
      F32x16 out = mul(acc[p][r], scale);
      if (tile.bias != nullptr) out = add(out, load(tile.bias + p * kPanelOutputs));
      store(tile.y + r * tile.ldy + p * kPanelOutputs, out);
    }
  }
}

template <int kBits, int T>
void multiply_unit(const Format& format, const void* unit, const Tile& tile) {
  const bool is_usual =
      format.group == kStepInputs && format.scale == ScaleType::float16 && !format.has_zeros;
  return is_usual ? multiply_unit<kBits, true, T>(format, unit, tile)
                  : multiply_unit<kBits, false, T>(format, unit, tile);
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
