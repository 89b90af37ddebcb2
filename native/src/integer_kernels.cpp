// Linear layers of whole numbers: codes of weights times inputs rounded to 8 bits.
//
// Lanes are outputs. Inside a group of inputs the sum is exact in 32 bits; then one multiply-add
// per group, in order of K, joins the output's float32 sum. So an output's bits depend on K and the
// format alone, whatever the rows of a tile and the instruction set. Codes are unpacked once for
// all rows of a tile.
#include <algorithm>

#include "block_formats.h"
#include "bytes.h"
#include "linear.h"

namespace vivace::VIVACE_ISA {
namespace {

// Rows that share unpacked codes, by the registers there are.
constexpr int kTileRows = VIVACE_LEVEL >= 2 ? 8 : 4;
// Up to kWideRows rows meet all panels of a unit at once, in the order in which memory has them.
constexpr int kWideRows = 4;

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

// ---------------------------------------------------------------- sources of codes

// A source gives the codes of 32 inputs and 16 outputs as eight vectors, and what turns sums of
// them into weights: stored zeros, scales, and for some a minimum. `kGroup`: inputs per
// scale, 0 if that is known at run time only (a multiple of 32, or the row).

template <int kCodeBits>
struct Panels {
  static constexpr int kBits = kCodeBits, kUnitPanels = kPanels;
  static constexpr int kGroup = 0, kMaxCode = (1 << kBits) - 1;
  static constexpr bool kHasMinimum = false;

  const uint8_t *scales, *zeros, *codes;  // of this panel and the first group
  size_t head_bytes, group_bytes;
  int group_shift;  // of steps
  ScaleType scale_type;
  bool has_zeros, is_row;  // is_row: one scale for all of K

  Panels() = default;
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

  static constexpr int kVectorStride = kPanels * 64;

  VIVACE_MEMBER void unpack(int step, Bytes64* codes) {
    const uint8_t* p = this->codes + static_cast<size_t>(step >> group_shift) * head_bytes +
                       static_cast<size_t>(step) * kBits * kVectorStride;
    if constexpr (kBits == 8) {
      VIVACE_UNROLL
      for (int j = 0; j < 8; ++j) codes[j] = load_bytes(p + kVectorStride * j);
    } else if constexpr (kBits == 4) {
      VIVACE_UNROLL
      for (int v = 0; v < 4; ++v) {
        const Bytes64 raw = load_bytes(p + kVectorStride * v);
        codes[v] = bits_at<0, 15>(raw);
        codes[v + 4] = bits_at<4, 15>(raw);
      }
    } else {
      VIVACE_UNROLL
      for (int v = 0; v < 2; ++v) {
        const Bytes64 raw = load_bytes(p + kVectorStride * v);
        codes[v] = bits_at<0, 3>(raw);
        codes[v + 2] = bits_at<2, 3>(raw);
        codes[v + 4] = bits_at<4, 3>(raw);
        codes[v + 6] = bits_at<6, 3>(raw);
      }
      if constexpr (kBits == 3) {
        const Bytes64 high = load_bytes(p + kVectorStride * 2);
        codes[0] = or_bit<0, 2>(codes[0], high);
        codes[1] = or_bit<1, 2>(codes[1], high);
        codes[2] = or_bit<2, 2>(codes[2], high);
        codes[3] = or_bit<3, 2>(codes[3], high);
        codes[4] = or_bit<4, 2>(codes[4], high);
        codes[5] = or_bit<5, 2>(codes[5], high);
        codes[6] = or_bit<6, 2>(codes[6], high);
        codes[7] = or_bit<7, 2>(codes[7], high);
      }
    }
  }

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

  Rows() = default;
  Rows(const Format&, int32_t K, const void* unit, int)
      : rows(static_cast<const char*>(unit)),
        stride(static_cast<size_t>(K / Block::kWeights) * sizeof(Block)) {}

  VIVACE_MEMBER const char* at(int block) const {
    return rows + static_cast<size_t>(block) * sizeof(Block);
  }
  VIVACE_MEMBER F32x16 row_scale() const { return set1(1.0f); }
  VIVACE_MEMBER F32x16 minimum(int) const { return zero(); }
  VIVACE_MEMBER I32x16 start(int, I32x16 offset) const { return offset; }
};

struct Q4_0 : Rows<BlockQ4_0> {
  static constexpr int kGroup = 32, kMaxCode = 15;
  using Rows::Rows;

  VIVACE_MEMBER void unpack(int step, Bytes64* codes) {
    transpose_rows(at(step) + 2, stride, codes);
    VIVACE_UNROLL
    for (int v = 0; v < 4; ++v) {
      codes[v + 4] = bits_at<4, 15>(codes[v]);
      codes[v] = bits_at<0, 15>(codes[v]);
    }
  }
  VIVACE_MEMBER F32x16 scale(int group) const {
    Bytes64 head;
    transpose_rows<1>(at(group), stride, &head);
    return low_halves(head, false);
  }
};

struct Q8_0 : Rows<BlockQ8_0> {
  static constexpr int kGroup = 32, kMaxCode = 255;
  using Rows::Rows;

  VIVACE_MEMBER void unpack(int step, Bytes64* codes) {
    transpose_rows(at(step) + 2, stride, codes);
    transpose_rows(at(step) + 18, stride, codes + 4);
    VIVACE_UNROLL
    for (int j = 0; j < 8; ++j) codes[j] = to_unsigned(codes[j]);
  }
  VIVACE_MEMBER F32x16 scale(int group) const {
    Bytes64 head;
    transpose_rows<1>(at(group), stride, &head);
    return low_halves(head, false);
  }
};

struct Q4_K : Rows<BlockQ4_K> {
  static constexpr int kGroup = 32, kMaxCode = 15;
  static constexpr bool kHasMinimum = true;
  using Rows::Rows;

  F32x16 block_scale, block_minimum;
  Bytes64 head[4];  // scale and minimum, then the 12 bytes of groups
  Bytes64 raw[8];   // of two groups

  VIVACE_MEMBER void unpack(int step, Bytes64* codes) {
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
      for (int j = 0; j < 8; ++j) codes[j] = bits_at<0, 15>(raw[j]);
    } else {
      VIVACE_UNROLL
      for (int j = 0; j < 8; ++j) codes[j] = bits_at<4, 15>(raw[j]);
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

  VIVACE_MEMBER void unpack(int step, Bytes64* codes) {
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
          codes[j] = or_shifted<4>(bits_at<0, 15>(low[j]), bits_at<0, 3>(high[j]));
          break;
        case 1:
          codes[j] = or_shifted<4>(bits_at<0, 15>(low[8 + j]), bits_at<2, 3>(high[j]));
          break;
        case 2:
          codes[j] = or_shifted<4>(bits_at<4, 15>(low[j]), bits_at<4, 3>(high[j]));
          break;
        default:
          codes[j] = or_shifted<4>(bits_at<4, 15>(low[8 + j]), bits_at<6, 3>(high[j]));
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
  float *scales, *minimums;

  Unpacked() = default;
  Unpacked(Source source, int32_t K, char* scratch)
      : codes(scratch),
        scales(reinterpret_cast<float*>(scratch + static_cast<size_t>(K) * kPanelOutputs)),
        minimums(scales + K / kGroup * kPanelOutputs) {
    for (int step = 0; step < K / kStepInputs; ++step) {
      Bytes64 unpacked[8];
      source.unpack(step, unpacked);
      for (int j = 0; j < 8; ++j) store_bytes(codes + 512 * step + 64 * j, unpacked[j]);
      constexpr int kGroups = kStepInputs / kGroup;
      for (int group = kGroups * step; group < kGroups * (step + 1); ++group) {
        store(scales + kPanelOutputs * group, source.scale(group));
        if constexpr (kHasMinimum) store(minimums + kPanelOutputs * group, source.minimum(group));
      }
    }
  }

  VIVACE_MEMBER void unpack(int step, Bytes64* out) const {
    VIVACE_UNROLL
    for (int j = 0; j < 8; ++j) out[j] = load_bytes(codes + 512 * step + 64 * j);
  }
  VIVACE_MEMBER F32x16 scale(int group) const { return load(scales + kPanelOutputs * group); }
  VIVACE_MEMBER F32x16 minimum(int group) const { return load(minimums + kPanelOutputs * group); }
  VIVACE_MEMBER I32x16 start(int, I32x16 offset) const { return offset; }
  VIVACE_MEMBER F32x16 row_scale() const { return set1(1.0f); }
};

// ---------------------------------------------------------------- tiles

constexpr int kUnpackTiles = 3;  // of rows, from which on blocks are taken apart once

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

// T rows of inputs times P panels, one after the other within each step.
template <class Source, int T, int P>
[[gnu::noinline]] void multiply_tile(const Source* panels, const Tile& tile) {
  Source sources[P];
  F32x16 acc[P][T];
  VIVACE_UNROLL
  for (int p = 0; p < P; ++p) {
    sources[p] = panels[p];
    VIVACE_UNROLL
    for (int r = 0; r < T; ++r) acc[p][r] = zero();
  }
  TileRows rows(tile);
  const int num_steps = (tile.K + kStepInputs - 1) / kStepInputs;
  Ahead ahead = tile.ahead;
  const auto start = [&](int p, int r, int group) {
    return sources[p].start(group, set1_i32(rows.scale(r, group).offset));
  };
  const auto join = [&](int p, int r, I32x16 sum, int group, F32x16 scale) {
    acc[p][r] = fma(to_float(sum), mul(scale, set1(rows.scale(r, group).scale)), acc[p][r]);
  };
  Bytes64 codes[8];
  if constexpr (Source::kGroup == 16) {
    for (int step = 0; step < num_steps; ++step) {
      rows.template forget<T>();
      ahead.advance();
      VIVACE_UNROLL
      for (int p = 0; p < P; ++p) {
        sources[p].unpack(step, codes);
        VIVACE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int group = 2 * step + half;
          const F32x16 scale = sources[p].scale(group);
          I32x16 sums[T];
          VIVACE_UNROLL
          for (int r = 0; r < T; ++r) sums[r] = start(p, r, group);
          dot<T, 4, Source::kMaxCode>(sums, codes + 4 * half,
                                      [&](int r) { return rows.input(r, step) + 16 * half; });
          VIVACE_UNROLL
          for (int r = 0; r < T; ++r) join(p, r, sums[r], group, scale);
        }
      }
    }
  } else if (Source::kGroup == 32 || tile.input_group == 32) {
    for (int step = 0; step < num_steps; ++step) {
      rows.template forget<T>();
      ahead.advance();
      VIVACE_UNROLL
      for (int p = 0; p < P; ++p) {
        sources[p].unpack(step, codes);
        const F32x16 scale = sources[p].scale(step);
        [[maybe_unused]] const F32x16 minimum = sources[p].minimum(step);
        I32x16 sums[T];
        VIVACE_UNROLL
        for (int r = 0; r < T; ++r) sums[r] = start(p, r, step);
        dot<T, 8, Source::kMaxCode>(sums, codes, [&](int r) { return rows.input(r, step); });
        VIVACE_UNROLL
        for (int r = 0; r < T; ++r) {
          join(p, r, sums[r], step, scale);
          if constexpr (Source::kHasMinimum)
            acc[p][r] = fma(minimum, set1(rows.product(r, step)), acc[p][r]);
        }
      }
    }
  } else {
    const int steps_per_group = tile.input_group / kStepInputs;
    for (int step = 0, group = 0; step < num_steps; ++group) {
      I32x16 sums[P][T];
      VIVACE_UNROLL
      for (int p = 0; p < P; ++p) VIVACE_UNROLL
      for (int r = 0; r < T; ++r) sums[p][r] = start(p, r, group);
      const int end = step + steps_per_group < num_steps ? step + steps_per_group : num_steps;
      for (; step < end; ++step) {
        rows.template forget<T>();
        ahead.advance();
        VIVACE_UNROLL
        for (int p = 0; p < P; ++p) {
          sources[p].unpack(step, codes);
          dot<T, 8, Source::kMaxCode>(sums[p], codes, [&](int r) { return rows.input(r, step); });
        }
      }
      VIVACE_UNROLL
      for (int p = 0; p < P; ++p) {
        const F32x16 scale = sources[p].scale(group);
        VIVACE_UNROLL
        for (int r = 0; r < T; ++r) join(p, r, sums[p][r], group, scale);
      }
    }
  }
  VIVACE_UNROLL
  for (int p = 0; p < P; ++p) {
    const F32x16 row_scale = sources[p].row_scale();
    const int outputs = tile.outputs - p * kPanelOutputs < kPanelOutputs
                            ? tile.outputs - p * kPanelOutputs
                            : kPanelOutputs;
    const float* own = tile.bias == nullptr ? nullptr : tile.bias + p * kPanelOutputs;
    const F32x16 bias = own == nullptr ? zero() : load_first(own, outputs);
    VIVACE_UNROLL
    for (int r = 0; r < T; ++r) {
      F32x16 out = mul(acc[p][r], row_scale);
      if (own != nullptr) out = add(out, bias);
      float* y = tile.y + r * tile.ldy + p * kPanelOutputs;
      if (outputs == kPanelOutputs)
        store(y, out);
      else
        store_first(y, out, outputs);
    }
  }
}

template <class Source>
void multiply_rows(int T, const Source* panel, const Tile& tile) {
  switch (T) {
#if VIVACE_LEVEL >= 2
    case 8:
      return multiply_tile<Source, 8, 1>(panel, tile);
    case 7:
      return multiply_tile<Source, 7, 1>(panel, tile);
    case 6:
      return multiply_tile<Source, 6, 1>(panel, tile);
    case 5:
      return multiply_tile<Source, 5, 1>(panel, tile);
#endif
    case 4:
      return multiply_tile<Source, 4, 1>(panel, tile);
    case 3:
      return multiply_tile<Source, 3, 1>(panel, tile);
    case 2:
      return multiply_tile<Source, 2, 1>(panel, tile);
    default:
      return multiply_tile<Source, 1, 1>(panel, tile);
  }
}

#if VIVACE_LEVEL >= 3
// Few rows times a unit of codes: what decoding does most, so with as few instructions a byte as can
// be. Where the registers suffice, codes are multiplied where they lie in their bytes: sums of those
// in upper bits are multiples of their place, and shifted down at a group's end.
// kIsUsual: groups of 32 with float16 scales.
template <int kBits, bool kIsUsual, int T>
[[gnu::noinline]] void multiply_unit(const Format& format, const void* unit, const Tile& tile) {
  // Of 3 bits two are together, and the third elsewhere.
  constexpr int kPlaceBits = kBits == 3 ? 2 : kBits, kPlaces = 8 / kPlaceBits;
  constexpr int kMask = (1 << kPlaceBits) - 1;
  constexpr int kSums = kBits != 3 && T * kPlaces <= 4 ? kPlaces : 1;  // one for each place?
  constexpr int P = T <= 2 ? kPanels : 2;                              // panels at once
  const ScaleType scale_type = kIsUsual ? ScaleType::float16 : format.scale;
  const bool has_zeros = !kIsUsual && format.has_zeros, is_row = !kIsUsual && format.group == 0;
  const CodesLayout layout = codes_layout(format, tile.K);
  const size_t scale_stride = kPanelOutputs * scale_bytes(scale_type);
  TileRows rows(tile);
  const auto* first = static_cast<const uint8_t*>(unit);
  const uint8_t* group_at = first;
  F32x16 acc[kPanels][T];
  for (auto& panel : acc)
    for (F32x16& one : panel) one = zero();
  const int num_steps = (tile.K + kStepInputs - 1) / kStepInputs;
  const int steps_per_group = kIsUsual ? 1 : tile.input_group / kStepInputs;
  for (int step = 0, group = 0; step < num_steps; ++group) {
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
          sums[p][r][0] =
              multiply_i32(sums[p][r][0], load_u8(zeros + (half + p) * kPanelOutputs));
        VIVACE_UNROLL
        for (int i = 1; i < kSums; ++i) sums[p][r][i] = set1_i32(0);
      }
      const uint8_t* at = group_at + head + half * 64;
      for (int s = 0; s < count; ++s, at += kPanels * kBits * 64) {
        VIVACE_UNROLL
        for (int v = 0; v < kPlaceBits; ++v) VIVACE_UNROLL
        for (int p = 0; p < P; ++p) {
          Bytes64 raw = load_bytes(at + (v * kPanels + p) * 64);
          __asm__("" : "+v"(raw.v));  // keeps it in a register: loads are scarce
          VIVACE_UNROLL
          for (int i = 0; i < kPlaces; ++i) {
            const int j = v + kPlaceBits * i;
            Bytes64 code = kSums > 1     ? masked(raw, kMask << kPlaceBits * i)
                           : kPlaces > 1 ? shifted(raw, kPlaceBits * i, kMask)
                                         : raw;
            if constexpr (kBits == 3)
              code = with_bit(code, load_bytes(at + (2 * kPanels + p) * 64), j, 2);
            VIVACE_UNROLL
            for (int r = 0; r < T; ++r)
              dot<1, 1, 255>(&sums[p][r][kSums > 1 ? i : 0], &code,
                             [&](int) { return rows.input(r, step + s) + 4 * j; });
          }
        }
      }
      VIVACE_UNROLL
      for (int p = 0; p < P; ++p) {
        const F32x16 scale = is_row ? set1(1.0f)
                                    : load_scales(scale_type, group_at + (half + p) * scale_stride);
        VIVACE_UNROLL
        for (int r = 0; r < T; ++r) {
          I32x16 sum = sums[p][r][0];
          VIVACE_UNROLL
          for (int i = 1; i < kSums; ++i)
            sum = add_i32(sum, shift_right(sums[p][r][i], kPlaceBits * i));
          acc[half + p][r] = fma(to_float(sum), mul(scale, set1(rows.scale(r, group).scale)),
                                 acc[half + p][r]);
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
#endif

// Up to kWideRows rows times a unit of codes.
template <int kBits>
void multiply_wide(int T, const Format& format, const void* unit, const Tile& tile) {
#if VIVACE_LEVEL >= 3
  switch (T) {
    case 4:
      return multiply_unit<kBits, 4>(format, unit, tile);
    case 3:
      return multiply_unit<kBits, 3>(format, unit, tile);
    case 2:
      return multiply_unit<kBits, 2>(format, unit, tile);
    default:
      return multiply_unit<kBits, 1>(format, unit, tile);
  }
#else
  Panels<kBits> panels[kPanels];
  for (int p = 0; p < kPanels; ++p) panels[p] = Panels<kBits>(format, tile.K, unit, p);
  switch (T) {
    case 4:
      return multiply_tile<Panels<kBits>, 4, kPanels>(panels, tile);
    case 3:
      return multiply_tile<Panels<kBits>, 3, kPanels>(panels, tile);
    case 2:
      return multiply_tile<Panels<kBits>, 2, kPanels>(panels, tile);
    default:
      return multiply_tile<Panels<kBits>, 1, kPanels>(panels, tile);
  }
#endif
}

// All rows of an item times one panel; tiles share them evenly.
template <class Source>
void multiply_panel(const Source& source, const LinearItem& item, int num_tiles, Tile& tile) {
  float* y = tile.y;
  for (int m = 0, i = 0; i < num_tiles; ++i) {
    const int count = (item.M - m) / (num_tiles - i);
    tile.x = static_cast<const char*>(item.x) + static_cast<size_t>(m) * item.x_stride;
    tile.y = y + m * item.ldy;
    multiply_rows(count, &source, tile);
    tile.ahead.per_step = 0;
    m += count;
  }
}

template <class Source>
void multiply_as(const Format& format, const LinearItem& item) {
  const size_t unit = unit_bytes(format, item.K);
  const int tiles = (item.M + kTileRows - 1) / kTileRows;
  const auto* weight = static_cast<const char*>(item.weight);
  Tile tile;
  tile.K = item.K;
  tile.input_group = format.input.group;
  tile.input = int8_layout(format.input, item.K);
  tile.x = static_cast<const char*>(item.x);
  tile.x_stride = item.x_stride;
  tile.ldy = item.ldy;
  const size_t steps = (static_cast<size_t>(item.K) + kStepInputs - 1) / kStepInputs;
  constexpr int kUnitOutputs = Source::kUnitPanels * kPanelOutputs;
  const auto unit_of = [&](int n) { return weight + static_cast<size_t>(n / kUnitOutputs) * unit; };
  // Panels from output n on are next; while they are read, their share of the unit after them is
  // brought.
  const auto aim = [&](int n, int panels) {
    tile.outputs = item.rows - n;
    tile.bias = item.bias == nullptr ? nullptr : item.bias + n;
    tile.y = item.y + n;
    const int after = (n / kUnitOutputs + 1) * kUnitOutputs;
    const auto* next = after < item.rows ? unit_of(after) : static_cast<const char*>(item.next);
    const size_t share = unit / Source::kUnitPanels * panels;
    const size_t panel = static_cast<size_t>(n % kUnitOutputs) / kPanelOutputs;
    tile.ahead = {next, panel * share, panel * share, next == nullptr ? 0 : share / steps};
  };
  int n = 0;
  if constexpr (Source::kGroup == 0) {
    if (item.M <= kWideRows) {
      for (; n + kUnitOutputs <= item.rows; n += kUnitOutputs) {
        aim(n, kPanels);
        multiply_wide<Source::kBits>(item.M, format, unit_of(n), tile);
      }
    }
  }
  for (; n < item.rows; n += kPanelOutputs) {
    const Source source(format, item.K, unit_of(n), n % kUnitOutputs / kPanelOutputs);
    aim(n, 1);
    if constexpr (Source::kGroup != 0) {
      if (tiles >= kUnpackTiles) {
        multiply_panel(Unpacked<Source>(source, item.K, item.scratch), item, tiles, tile);
        continue;
      }
    }
    multiply_panel(source, item, tiles, tile);
  }
}

void multiply(const Format& format, const LinearItem& item) {
  switch (format.storage) {
    case Storage::q4_0:
      return multiply_as<Q4_0>(format, item);
    case Storage::q8_0:
      return multiply_as<Q8_0>(format, item);
    case Storage::q4_k:
      return multiply_as<Q4_K>(format, item);
    case Storage::q6_k:
      return multiply_as<Q6_K>(format, item);
    default:
      break;
  }
  switch (format.bits) {
    case 2:
      return multiply_as<Panels<2>>(format, item);
    case 3:
      return multiply_as<Panels<3>>(format, item);
    case 4:
      return multiply_as<Panels<4>>(format, item);
    default:
      return multiply_as<Panels<8>>(format, item);
  }
}

// ---------------------------------------------------------------- inputs

// Inputs below this magnitude count as zero: 127 divided by them could overflow.
constexpr uint32_t kTinyBits = 0x0d800000;  // 2^-100

void prepare(const InputFormat& format, int32_t K, int32_t from, int32_t to, const float* row,
             void* out) {
  const Int8Layout layout = int8_layout(format, K);
  auto* codes = static_cast<int8_t*>(out);
  auto* scales = reinterpret_cast<InputScale*>(codes + layout.scales_at);
  auto* products = reinterpret_cast<float*>(codes + layout.products_at);
  const int num_vectors = format.group / 16;
  // The last range has the padding too.
  const int32_t end = to == K ? layout.num_groups : to / format.group;
  for (int32_t group = from / format.group; group < end; ++group) {
    const int32_t first = group * format.group;
    const auto vector = [&](int i) {
      const int32_t k = first + 16 * i;
      return k + 16 <= K ? load(row + k) : k < K ? load_first(row + k, K - k) : zero();
    };
    I32x16 most = set1_i32(0);
    for (int i = 0; i < num_vectors; ++i) most = max_magnitude(most, vector(i));
    const auto bits = static_cast<uint32_t>(reduce_max_i32(most));
    const float size = float_of(bits);
    const bool is_usual = bits >= kTinyBits && bits < 0x7f800000u;
    const F32x16 inverse = set1(is_usual ? 127.0f / size : 0.0f);
    I32x16 sum = set1_i32(0);
    for (int i = 0; i < num_vectors; ++i) {
      const I32x16 whole = is_usual ? round_to_i32(mul(vector(i), inverse)) : set1_i32(0);
      store_low_bytes(codes + first + 16 * i, whole);
      sum = add_i32(sum, whole);
    }
    // What is not finite stays so: as a scale it spoils every output.
    const float scale = is_usual ? size / 127.0f : bits < kTinyBits ? 0.0f : size;
    const int32_t minus = -reduce_add_i32(sum);
    scales[group] = {scale, minus * format.zero};
    products[group] = scale * static_cast<float>(minus);
  }
}

// ---------------------------------------------------------------- rows of a matrix

template <class Source>
void read_row(const Format& format, int32_t K, const void* unit, int output, float factor,
              float* y) {
  Source source(format, K, unit, output / kPanelOutputs);
  output %= kPanelOutputs;
  const float row_scale = [&] {
    float lanes[16];
    store(lanes, source.row_scale());
    return lanes[output];
  }();
  Bytes64 codes[8];
  for (int32_t k = 0; k < K; k += 16) {
    uint8_t bytes[4][64];
    const int step = k / kStepInputs, first = k % kStepInputs / 4;
    if (first == 0) source.unpack(step, codes);
    for (int j = 0; j < 4; ++j) store_bytes(bytes[j], codes[first + j]);
    const int group = Source::kGroup != 0 ? k / Source::kGroup
                      : format.group != 0 ? k / format.group
                                          : 0;
    float scales[16], minimums[16];
    int32_t offsets[16];
    store(scales, source.scale(group));
    store(minimums, source.minimum(group));
    const I32x16 start = source.start(group, set1_i32(-format.input.zero));
    __builtin_memcpy(offsets, &start, 64);
    const float scale = scales[output] * row_scale;
    for (int i = 0; i < 16 && k + i < K; ++i) {
      const int code = bytes[i / 4][4 * output + i % 4] + offsets[output];
      float value = static_cast<float>(code) * scale;
      if constexpr (Source::kHasMinimum) value = value - minimums[output];
      y[k + i] = factor * value;
    }
  }
}

void read(const Format& format, int32_t K, const void* unit, int output, float factor, float* y) {
  switch (format.storage) {
    case Storage::q4_0:
      return read_row<Q4_0>(format, K, unit, output, factor, y);
    case Storage::q8_0:
      return read_row<Q8_0>(format, K, unit, output, factor, y);
    case Storage::q4_k:
      return read_row<Q4_K>(format, K, unit, output, factor, y);
    case Storage::q6_k:
      return read_row<Q6_K>(format, K, unit, output, factor, y);
    default:
      break;
  }
  switch (format.bits) {
    case 2:
      return read_row<Panels<2>>(format, K, unit, output, factor, y);
    case 3:
      return read_row<Panels<3>>(format, K, unit, output, factor, y);
    case 4:
      return read_row<Panels<4>>(format, K, unit, output, factor, y);
    default:
      return read_row<Panels<8>>(format, K, unit, output, factor, y);
  }
}

// ---------------------------------------------------------------- what the machine can do at most

double peak(int64_t rounds) {
  constexpr int kChains = VIVACE_LEVEL >= 2 ? 24 : 4;
  uint8_t raw[64];
  int8_t four[32];
  for (int i = 0; i < 64; ++i) raw[i] = 3;
  for (int i = 0; i < 32; ++i) four[i] = 1;
  Bytes64 codes[8];
  for (Bytes64& vector : codes) vector = load_bytes(raw);
  I32x16 sums[kChains];
  VIVACE_UNROLL
  for (int i = 0; i < kChains; ++i) sums[i] = set1_i32(i);
  for (int64_t round = 0; round < rounds; ++round) {
    VIVACE_UNROLL
    for (int i = 0; i < kChains; ++i) dot<1, 8, 15>(sums + i, codes, [&](int) { return four; });
    __asm__ volatile("" : : : "memory");
  }
  int32_t total = 0;
  VIVACE_UNROLL
  for (int i = 0; i < kChains; ++i) total += reduce_add_i32(sums[i]);
  __asm__ volatile("" : : "m"(total));
  return static_cast<double>(rounds) * kChains * 8 * 128;
}

}  // namespace

extern const IntegerKernels integer_kernels;
const IntegerKernels integer_kernels = {prepare, multiply, read, peak};

}  // namespace vivace::VIVACE_ISA
