// Decoding of quantized blocks on one instruction set: plain loops that the compiler vectorizes.
//
// FloatEnvironment takes denormals for zero; only MXFP4 can have one as a scale or a weight, and it
// is decoded in whole numbers where it does. All other products and sums are exact or normal.
#include "block_formats.h"
#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

VIVACE_INLINE float widen(const Float16Bytes& half) {
  return f16_to_float(static_cast<uint16_t>(half[0] | half[1] << 8));
}

// ---------------------------------------------------------------- 32 weights

VIVACE_INLINE void decode_block(const BlockQ4_0& block, float* __restrict y) {
  const float scale = widen(block.scale);
  for (int i = 0; i < 16; ++i) {
    y[i] = scale * static_cast<float>((block.low[i] & 15) - 8);
    y[i + 16] = scale * static_cast<float>((block.low[i] >> 4) - 8);
  }
}

VIVACE_INLINE void decode_block(const BlockQ4_1& block, float* __restrict y) {
  const float scale = widen(block.scale), minimum = widen(block.minimum);
  for (int i = 0; i < 16; ++i) {
    y[i] = scale * static_cast<float>(block.low[i] & 15) + minimum;
    y[i + 16] = scale * static_cast<float>(block.low[i] >> 4) + minimum;
  }
}

// Sixteen for weights whose fifth bit is set.
VIVACE_INLINE void fifth_bits(const uint8_t (&high)[4], int* __restrict sixteens) {
  const uint32_t bits =
      high[0] | high[1] << 8 | high[2] << 16 | static_cast<uint32_t>(high[3]) << 24;
  for (int i = 0; i < 32; ++i) sixteens[i] = static_cast<int>(bits >> i & 1u) << 4;
}

VIVACE_INLINE void decode_block(const BlockQ5_0& block, float* __restrict y) {
  const float scale = widen(block.scale);
  int sixteens[32];
  fifth_bits(block.high, sixteens);
  for (int i = 0; i < 16; ++i) {
    y[i] = scale * static_cast<float>((block.low[i] & 15) + sixteens[i] - 16);
    y[i + 16] = scale * static_cast<float>((block.low[i] >> 4) + sixteens[i + 16] - 16);
  }
}

VIVACE_INLINE void decode_block(const BlockQ5_1& block, float* __restrict y) {
  const float scale = widen(block.scale), minimum = widen(block.minimum);
  int sixteens[32];
  fifth_bits(block.high, sixteens);
  for (int i = 0; i < 16; ++i) {
    y[i] = scale * static_cast<float>((block.low[i] & 15) + sixteens[i]) + minimum;
    y[i + 16] = scale * static_cast<float>((block.low[i] >> 4) + sixteens[i + 16]) + minimum;
  }
}

VIVACE_INLINE void decode_block(const BlockQ8_0& block, float* __restrict y) {
  const float scale = widen(block.scale);
  for (int i = 0; i < 32; ++i) y[i] = scale * static_cast<float>(block.q[i]);
}

VIVACE_INLINE void look_up(const float (&table)[16], const uint8_t (&low)[16],
                           float* __restrict y) {
  for (int i = 0; i < 16; ++i) {
    y[i] = table[low[i] & 15];
    y[i + 16] = table[low[i] >> 4];
  }
}

VIVACE_INLINE void decode_block(const BlockIQ4_NL& block, float* __restrict y) {
  constexpr float kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};
  const float scale = widen(block.scale);
  float table[16];
  for (int i = 0; i < 16; ++i) table[i] = scale * kLevels[i];
  look_up(table, block.low, y);
}

// level * 2^(exponent - 128) for exponents whose product may be denormal: 0 and 1
VIVACE_INLINE float tiny_product(uint32_t level, int exponent) {
  const uint32_t units = level << (21 + exponent);  // of the smallest denormal, 2^-149
  return float_of(units < 1u << 23 ? units
                                   : bits_of(static_cast<float>(units)) - (uint32_t{149} << 23));
}

VIVACE_INLINE void decode_block(const BlockMXFP4& block, float* __restrict y) {
  constexpr uint32_t kLevels[8] = {0, 1, 2, 3, 4, 6, 8, 12};  // twice the values
  const float scale = float_of(static_cast<uint32_t>(block.exponent - 1) << 23);  // half the scale
  float table[16];
  for (int i = 0; i < 8; ++i)
    table[i] = block.exponent < 2 ? tiny_product(kLevels[i], block.exponent)
                                  : scale * static_cast<float>(kLevels[i]);
  for (int i = 0; i < 8; ++i) table[i + 8] = i == 0 ? 0.0f : -table[i];
  look_up(table, block.low, y);
}

// ---------------------------------------------------------------- 256 weights

VIVACE_INLINE void decode_block(const BlockQ2_K& block, float* __restrict y) {
  const float scale = widen(block.scale), minimum = widen(block.minimum);
  for (int group = 0; group < 16; ++group) {
    const float group_scale = scale * static_cast<float>(block.groups[group] & 15);
    const float group_minimum = minimum * static_cast<float>(block.groups[group] >> 4);
    const uint8_t* low = block.low + 32 * (group / 8) + 16 * (group % 2);
    const int shift = group % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i)
      y[16 * group + i] = group_scale * static_cast<float>(low[i] >> shift & 3) - group_minimum;
  }
}

VIVACE_INLINE void decode_block(const BlockQ3_K& block, float* __restrict y) {
  const float scale = widen(block.scale);
  for (int group = 0; group < 16; ++group) {
    const int low_half = block.groups[group % 8] >> group / 8 * 4 & 15;
    const int high_pair = block.groups[8 + group % 4] >> group / 4 * 2 & 3;
    const float group_scale = scale * static_cast<float>((low_half | high_pair << 4) - 32);
    const uint8_t* low = block.low + 32 * (group / 8) + 16 * (group % 2);
    const uint8_t* high = block.high + 16 * (group % 2);
    const int shift = group % 8 / 2 * 2, bit = group / 2;
    for (int i = 0; i < 16; ++i) {
      const int q = (low[i] >> shift & 3) | (high[i] >> bit & 1) << 2;
      y[16 * group + i] = group_scale * static_cast<float>(q - 4);
    }
  }
}

struct GroupScale {
  int scale, minimum;
};

// Of group 0 to 7 in the packing of Q4_K and Q5_K.
VIVACE_INLINE GroupScale group_scale(const uint8_t (&groups)[12], int group) {
  if (group < 4) return {groups[group] & 63, groups[group + 4] & 63};
  return {(groups[group + 4] & 15) | groups[group - 4] >> 6 << 4,
          groups[group + 4] >> 4 | groups[group] >> 6 << 4};
}

VIVACE_INLINE void decode_block(const BlockQ4_K& block, float* __restrict y) {
  const float scale = widen(block.scale), minimum = widen(block.minimum);
  for (int pair = 0; pair < 4; ++pair) {
    const GroupScale a = group_scale(block.groups, 2 * pair);
    const GroupScale b = group_scale(block.groups, 2 * pair + 1);
    const float a_scale = scale * static_cast<float>(a.scale);
    const float b_scale = scale * static_cast<float>(b.scale);
    const float a_minimum = minimum * static_cast<float>(a.minimum);
    const float b_minimum = minimum * static_cast<float>(b.minimum);
    const uint8_t* low = block.low + 32 * pair;
    for (int i = 0; i < 32; ++i) {
      y[64 * pair + i] = a_scale * static_cast<float>(low[i] & 15) - a_minimum;
      y[64 * pair + 32 + i] = b_scale * static_cast<float>(low[i] >> 4) - b_minimum;
    }
  }
}

VIVACE_INLINE void decode_block(const BlockQ5_K& block, float* __restrict y) {
  const float scale = widen(block.scale), minimum = widen(block.minimum);
  for (int group = 0; group < 8; ++group) {
    const GroupScale own = group_scale(block.groups, group);
    const float group_scale = scale * static_cast<float>(own.scale);
    const float group_minimum = minimum * static_cast<float>(own.minimum);
    const uint8_t* low = block.low + 32 * (group / 2);
    const int shift = group % 2 * 4;
    for (int i = 0; i < 32; ++i) {
      const int q = (low[i] >> shift & 15) | (block.high[i] >> group & 1) << 4;
      y[32 * group + i] = group_scale * static_cast<float>(q) - group_minimum;
    }
  }
}

VIVACE_INLINE void decode_block(const BlockQ6_K& block, float* __restrict y) {
  const float scale = widen(block.scale);
  for (int group = 0; group < 16; ++group) {
    const float group_scale = scale * static_cast<float>(block.groups[group]);
    const uint8_t* low = block.low + 64 * (group / 8) + 16 * (group % 4);
    const uint8_t* high = block.high + 32 * (group / 8) + 16 * (group % 2);
    const int low_shift = group % 8 / 4 * 4, high_shift = group % 8 / 2 * 2;
    for (int i = 0; i < 16; ++i) {
      const int q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
      y[16 * group + i] = group_scale * static_cast<float>(q - 32);
    }
  }
}

// ---------------------------------------------------------------- all formats

// Keeps denormals, which float_to_bf16 does not.
VIVACE_INLINE uint16_t round_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(is_nan ? bits >> 16 | 0x40u : rounded);
}

template <class Block>
void decode_blocks(const void* from, int64_t num_blocks, DecodedType type, void* out) {
  const auto* blocks = static_cast<const Block*>(from);
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t first = i * Block::kWeights;
    if (type == DecodedType::float32) {
      decode_block(blocks[i], static_cast<float*>(out) + first);
      continue;
    }
    float decoded[Block::kWeights];
    decode_block(blocks[i], decoded);
    uint16_t* rounded = static_cast<uint16_t*>(out) + first;
    if (type == DecodedType::float16)
      for (int j = 0; j < Block::kWeights; j += kLanes) store_f16(rounded + j, load(decoded + j));
    else
      for (int j = 0; j < Block::kWeights; ++j) rounded[j] = round_to_bf16(decoded[j]);
  }
}

template <class Block>
constexpr BlockFormat format(const char* name) {
  return {name, Block::kWeights, sizeof(Block), decode_blocks<Block>};
}

constexpr BlockFormat kFormats[] = {
    format<BlockQ4_0>("Q4_0"), format<BlockQ4_1>("Q4_1"),     format<BlockQ5_0>("Q5_0"),
    format<BlockQ5_1>("Q5_1"), format<BlockQ8_0>("Q8_0"),     format<BlockQ2_K>("Q2_K"),
    format<BlockQ3_K>("Q3_K"), format<BlockQ4_K>("Q4_K"),     format<BlockQ5_K>("Q5_K"),
    format<BlockQ6_K>("Q6_K"), format<BlockIQ4_NL>("IQ4_NL"), format<BlockMXFP4>("MXFP4"),
};

}  // namespace

extern const BlockKernels block_kernels;
const BlockKernels block_kernels = {kFormats, sizeof(kFormats) / sizeof(kFormats[0])};

}  // namespace vivace::VIVACE_ISA
