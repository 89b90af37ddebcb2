// Where kernels of whole numbers take a matrix's codes and scales from.
//
// A source is one panel: 16 outputs. It gives the codes of 32 inputs, a step, as eight vectors, one
// at a time, and what turns sums of them into weights: stored zeros, scales, and for some a
// minimum. `kGroup`: inputs per scale, 0 if that is known at run time only (a multiple of 32, or
// the row).
#pragma once

#include "block_formats.h"
#include "bytes.h"
#include "format.h"

namespace vivace::VIVACE_ISA {
namespace {

VIVACE_INLINE F32x16 load_scales(ScaleType type, const uint8_t* p) {
  switch (type) {
    case ScaleType::float32:
      return load(reinterpret_cast<const float*>(p));
    case ScaleType::float16:
      return load_f16(reinterpret_cast<const uint16_t*>(p));
    case ScaleType::bfloat16:
      return load_bf16(reinterpret_cast<const uint16_t*>(p));
    case ScaleType::e8m0:  // 2^-127 is a denormal and counts as zero
      return bits_to_float(shift_left<23>(load_u8(p)));
  }
  return zero();
}

constexpr int kVectorStride = kPanels * 64;  // from one vector of a panel to its next

// Of 3 bits two are together, and the third elsewhere.
template <int kBits>
constexpr int kPlaceBits = kBits == 3 ? 2 : kBits;

// The codes of inputs 4 j .. 4 j + 3 of a panel's step, of which `raw` has vector j % kPlaceBits,
// and `third` the third bits if there are any.
template <int kBits>
VIVACE_INLINE Bytes64 code_of(Bytes64 raw, const uint8_t* third, int j) {
  constexpr int kPlace = kPlaceBits<kBits>;
  if constexpr (kBits == 8) return raw;
  const Bytes64 code = bits_at(raw, j / kPlace * kPlace, (1 << kPlace) - 1);
  if constexpr (kBits != 3) return code;
  return or_bit(code, load_bytes(third), j, kPlace);
}

template <int kBits>
VIVACE_INLINE Bytes64 code_at(const uint8_t* step, int j) {
  constexpr int kPlace = kPlaceBits<kBits>;
  return code_of<kBits>(load_bytes(step + j % kPlace * kVectorStride),
                        step + kPlace * kVectorStride, j);
}

template <int kCodeBits>
struct Panels {
  static constexpr int kBits = kCodeBits, kUnitPanels = kPanels;
  static constexpr int kGroup = 0, kMaxCode = (1 << kBits) - 1;
  static constexpr bool kHasMinimum = false;

  const uint8_t *scales, *zeros, *codes;  // of this panel and the first group
  const uint8_t* at;                      // of a step's codes
  size_t head_bytes, group_bytes;
  int group_shift;  // of steps
  ScaleType scale_type;
  bool has_zeros, is_row;  // is_row: one scale for all of K

  Panels(const Format& format, int32_t K, const void* unit, int panel)
      : scale_type(format.scale), has_zeros(format.has_zeros), is_row(format.group == 0) {
    const CodesLayout layout = codes_layout(format, K);
    const auto* first = static_cast<const uint8_t*>(unit);
    scales = first + static_cast<size_t>(panel) * kPanelOutputs * scale_bytes(format.scale);
    zeros = first + layout.zeros_at + panel * kPanelOutputs;
    codes = first + layout.codes_at + panel * 64;
    head_bytes = layout.codes_at;
    group_bytes = layout.group_bytes;
    group_shift = is_row ? 31 : __builtin_ctz(static_cast<unsigned>(layout.group_steps));
  }

  VIVACE_MEMBER void begin(int step) {
    at = codes + static_cast<size_t>(step >> group_shift) * head_bytes +
         static_cast<size_t>(step) * kBits * kVectorStride;
  }
  VIVACE_MEMBER Bytes64 code(int j) const { return code_at<kBits>(at, j); }

  VIVACE_MEMBER F32x16 scale_at(int group) const {
    return load_scales(scale_type, scales + static_cast<size_t>(group) * group_bytes);
  }
  VIVACE_MEMBER F32x16 scale(int group) const { return is_row ? set1(1.0f) : scale_at(group); }
  // What a row's whole sum is multiplied with in the end.
  VIVACE_MEMBER F32x16 row_scale() const { return is_row ? scale_at(0) : set1(1.0f); }

  // What sums start from, by an input's offset.
  VIVACE_MEMBER I32x16 start(int group, I32x16 offset) const {
    if (!has_zeros) return offset;
    const size_t at = is_row ? 0 : static_cast<size_t>(group) * group_bytes;
    return multiply_i32(offset, load_u8(zeros + at));
  }
  VIVACE_MEMBER F32x16 minimum(int) const { return zero(); }
};

// 16 rows of blocks, read where a file has them and transposed on the way.
template <class Block>
struct Rows {
  static constexpr int kUnitPanels = 1;
  static constexpr bool kHasMinimum = false;
  const char* rows;
  size_t stride;
  Bytes64 codes[8];  // of a step

  Rows(const Format&, int32_t K, const void* unit, int)
      : rows(static_cast<const char*>(unit)),
        stride(static_cast<size_t>(K / Block::kWeights) * sizeof(Block)) {}

  VIVACE_MEMBER const char* at(int block) const {
    return rows + static_cast<size_t>(block) * sizeof(Block);
  }
  VIVACE_MEMBER Bytes64 code(int j) const { return load_bytes(codes + j); }
  // The float16 that a block starts with.
  VIVACE_MEMBER F32x16 scale(int block) const {
    Bytes64 head;
    transpose_rows<1>(at(block), stride, &head);
    return low_halves(head, false);
  }
  VIVACE_MEMBER F32x16 row_scale() const { return set1(1.0f); }
  VIVACE_MEMBER F32x16 minimum(int) const { return zero(); }
  VIVACE_MEMBER I32x16 start(int, I32x16 offset) const { return offset; }
};

struct Q4_0 : Rows<BlockQ4_0> {
  static constexpr int kGroup = 32, kMaxCode = 15;
  using Rows::Rows;

  VIVACE_MEMBER void begin(int step) {
    transpose_rows(at(step) + 2, stride, codes);
    VIVACE_UNROLL
    for (int v = 0; v < 4; ++v) {
      codes[v + 4] = bits_at(codes[v], 4, 15);
      codes[v] = bits_at(codes[v], 0, 15);
    }
  }
};

struct Q8_0 : Rows<BlockQ8_0> {
  static constexpr int kGroup = 32, kMaxCode = 255;
  using Rows::Rows;

  VIVACE_MEMBER void begin(int step) {
    transpose_rows(at(step) + 2, stride, codes);
    transpose_rows(at(step) + 18, stride, codes + 4);
    VIVACE_UNROLL
    for (int j = 0; j < 8; ++j) codes[j] = to_unsigned(codes[j]);
  }
};

struct Q4_K : Rows<BlockQ4_K> {
  static constexpr int kGroup = 32, kMaxCode = 15;
  static constexpr bool kHasMinimum = true;
  using Rows::Rows;

  F32x16 block_scale, block_minimum;
  Bytes64 head[4];  // scale and minimum, then the 12 bytes of groups
  Bytes64 raw[8];   // of two groups

  VIVACE_MEMBER void begin(int step) {
    const char* block = at(step / 8);
    const int group = step % 8;
    if (group == 0) {
      transpose_rows(block, stride, head);
      block_scale = low_halves(head[0], false);
      block_minimum = low_halves(head[0], true);
    }
    if (group % 2 == 0) {
      transpose_rows(block + 16 + 16 * group, stride, raw);
      transpose_rows(block + 32 + 16 * group, stride, raw + 4);
      VIVACE_UNROLL
      for (int j = 0; j < 8; ++j) codes[j] = bits_at(raw[j], 0, 15);
    } else {
      VIVACE_UNROLL
      for (int j = 0; j < 8; ++j) codes[j] = bits_at(raw[j], 4, 15);
    }
  }
  // Six bits of a group's scale (low 0) or minimum (low 1).
  VIVACE_MEMBER F32x16 small(int step, int which) const {
    const int group = step % 8, shift = 8 * (group % 4);
    if (group < 4) return to_float(field(head[1 + which], shift, 63));
    const I32x16 low = field(head[3], shift + 4 * which, 15);
    return to_float(add_i32(low, shift_left<4>(field(head[1 + which], shift + 6, 3))));
  }
  VIVACE_MEMBER F32x16 scale(int group) const { return mul(block_scale, small(group, 0)); }
  VIVACE_MEMBER F32x16 minimum(int group) const { return mul(block_minimum, small(group, 1)); }
};

struct Q6_K : Rows<BlockQ6_K> {
  static constexpr int kGroup = 16, kMaxCode = 63;
  using Rows::Rows;

  F32x16 block_scale;
  Bytes64 scales[4];
  Bytes64 low[16], high[8];  // of four steps

  VIVACE_MEMBER void begin(int step) {
    const char* block = at(step / 8);
    const int half = step % 8 / 4, part = step % 4;
    if (step % 8 == 0) {
      transpose_rows(block + 192, stride, scales);
      // The scale is the block's last two bytes: the upper half of the last four.
      Bytes64 tail[4];
      transpose_rows(block + 194, stride, tail);
      block_scale = low_halves(tail[3], true);
    }
    if (part == 0) {
      VIVACE_UNROLL
      for (int i = 0; i < 4; ++i) transpose_rows(block + 64 * half + 16 * i, stride, low + 4 * i);
      VIVACE_UNROLL
      for (int i = 0; i < 2; ++i)
        transpose_rows(block + 128 + 32 * half + 16 * i, stride, high + 4 * i);
    }
    VIVACE_UNROLL
    for (int j = 0; j < 8; ++j) {
      switch (part) {
        case 0:
          codes[j] = or_shifted(bits_at(low[j], 0, 15), bits_at(high[j], 0, 3), 4);
          break;
        case 1:
          codes[j] = or_shifted(bits_at(low[8 + j], 0, 15), bits_at(high[j], 2, 3), 4);
          break;
        case 2:
          codes[j] = or_shifted(bits_at(low[j], 4, 15), bits_at(high[j], 4, 3), 4);
          break;
        default:
          codes[j] = or_shifted(bits_at(low[8 + j], 4, 15), bits_at(high[j], 6, 3), 4);
      }
    }
  }
  VIVACE_MEMBER F32x16 scale(int group) const {
    const int small = group % 16;
    return mul(block_scale, to_float(signed_byte(scales[small / 4], 8 * (small % 4))));
  }
};

// Codes, scales and minimums of another source, taken out once for many rows.
template <class Source>
struct Unpacked {
  static constexpr int kGroup = Source::kGroup, kMaxCode = Source::kMaxCode;
  static constexpr bool kHasMinimum = Source::kHasMinimum;

  char* codes;
  const char* at;  // of a step's codes
  float *scales, *minimums;

  Unpacked(Source source, int32_t K, char* scratch)
      : codes(scratch),
        scales(reinterpret_cast<float*>(scratch + static_cast<size_t>(K) * kPanelOutputs)),
        minimums(scales + K / kGroup * kPanelOutputs) {
    for (int step = 0; step < K / kStepInputs; ++step) {
      source.begin(step);
      for (int j = 0; j < 8; ++j) store_bytes(codes + 512 * step + 64 * j, source.code(j));
      constexpr int kGroups = kStepInputs / kGroup;
      for (int group = kGroups * step; group < kGroups * (step + 1); ++group) {
        store(scales + kPanelOutputs * group, source.scale(group));
        if constexpr (kHasMinimum) store(minimums + kPanelOutputs * group, source.minimum(group));
      }
    }
  }

  VIVACE_MEMBER void begin(int step) { at = codes + 512 * step; }
  VIVACE_MEMBER Bytes64 code(int j) const { return load_bytes(at + 64 * j); }
  VIVACE_MEMBER F32x16 scale(int group) const { return load(scales + kPanelOutputs * group); }
  VIVACE_MEMBER F32x16 minimum(int group) const { return load(minimums + kPanelOutputs * group); }
  VIVACE_MEMBER I32x16 start(int, I32x16 offset) const { return offset; }
  VIVACE_MEMBER F32x16 row_scale() const { return set1(1.0f); }
};

// Calls f.operator()<Source>() with the source of a format.
template <class F>
void with_source(const Format& format, F f) {
  switch (format.storage) {
    case Storage::q4_0:
      return f.template operator()<Q4_0>();
    case Storage::q8_0:
      return f.template operator()<Q8_0>();
    case Storage::q4_k:
      return f.template operator()<Q4_K>();
    case Storage::q6_k:
      return f.template operator()<Q6_K>();
    default:
      break;
  }
  switch (format.bits) {
    case 2:
      return f.template operator()<Panels<2>>();
    case 3:
      return f.template operator()<Panels<3>>();
    case 4:
      return f.template operator()<Panels<4>>();
    default:
      return f.template operator()<Panels<8>>();
  }
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
