// Quantized weights as GGUF files store them: rows of blocks whose weights share scales.
//
// Every struct is the layout in the file, aligned to a byte, so that kernels read blocks where they
// lie. A float16 is its two bytes, little endian. What a block decodes to is the arithmetic of
// block_kernels.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vivace {

using Float16Bytes = uint8_t[2];

// ---- 32 weights; weight i < 16 is the low half of byte i, weight i + 16 its high half

struct BlockQ4_0 {  // scale * (q - 8)
  static constexpr int kWeights = 32;
  Float16Bytes scale;
  uint8_t low[16];
};

struct BlockQ4_1 {  // scale * q + minimum
  static constexpr int kWeights = 32;
  Float16Bytes scale;
  Float16Bytes minimum;
  uint8_t low[16];
};

struct BlockQ5_0 {  // scale * (q - 16)
  static constexpr int kWeights = 32;
  Float16Bytes scale;
  uint8_t high[4];  // bit i is the fifth bit of weight i
  uint8_t low[16];
};

struct BlockQ5_1 {  // scale * q + minimum
  static constexpr int kWeights = 32;
  Float16Bytes scale;
  Float16Bytes minimum;
  uint8_t high[4];
  uint8_t low[16];
};

struct BlockQ8_0 {  // scale * q
  static constexpr int kWeights = 32;
  Float16Bytes scale;
  int8_t q[32];
};

struct BlockIQ4_NL {  // scale * a table of 16 whole numbers
  static constexpr int kWeights = 32;
  Float16Bytes scale;
  uint8_t low[16];
};

struct BlockMXFP4 {  // 2^(exponent - 127) * a float of 1 sign, 2 exponent and 1 mantissa bits
  static constexpr int kWeights = 32;
  uint8_t exponent;
  uint8_t low[16];
};

// ---- 256 weights in groups of 16 or 32 that have small integer scales of their own

struct BlockQ2_K {  // scale * group scale * q - minimum * group minimum
  static constexpr int kWeights = 256;
  uint8_t groups[16];  // of 16 weights: scale in the low half, minimum in the high half
  uint8_t low[64];     // 2 bits; byte 32 h + i holds weights 128 h + 32 j + i, j = 0..3
  Float16Bytes scale;
  Float16Bytes minimum;
};

struct BlockQ3_K {  // scale * (group scale - 32) * (q - 4)
  static constexpr int kWeights = 256;
  uint8_t high[32];    // bit j of byte i is the third bit of weight 32 j + i
  uint8_t low[64];     // 2 bits, as in Q2_K
  uint8_t groups[12];  // 6 bits for each 16 weights: low halves in 8 bytes, high pairs in 4
  Float16Bytes scale;
};

// `groups` of Q4_K and Q5_K: 6-bit scales and minimums of 8 groups of 32 weights. Bytes 0 to 3 hold
// scales of groups 0 to 3 in their low six bits, bytes 4 to 7 minimums. Groups 4 to 7 have scales
// in the low and minimums in the high halves of bytes 8 to 11, and the upper two bits of both above
// those of groups 0 to 3.

struct BlockQ4_K {  // scale * group scale * q - minimum * group minimum
  static constexpr int kWeights = 256;
  Float16Bytes scale;
  Float16Bytes minimum;
  uint8_t groups[12];
  uint8_t low[128];  // byte 32 g + i holds weights 64 g + i and 64 g + 32 + i
};

struct BlockQ5_K {  // as Q4_K
  static constexpr int kWeights = 256;
  Float16Bytes scale;
  Float16Bytes minimum;
  uint8_t groups[12];
  uint8_t high[32];  // bit j of byte i is the fifth bit of weight 32 j + i
  uint8_t low[128];
};

struct BlockQ6_K {  // scale * group scale * (q - 32)
  static constexpr int kWeights = 256;
  uint8_t low[128];   // 4 bits; byte 64 h + i: weights 128 h + i and 128 h + 64 + i
  uint8_t high[64];   // 2 bits, as Q2_K's
  int8_t groups[16];  // scales of 16 weights each
  Float16Bytes scale;
};

static_assert(sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20 && sizeof(BlockQ5_0) == 22 &&
              sizeof(BlockQ5_1) == 24 && sizeof(BlockQ8_0) == 34 && sizeof(BlockIQ4_NL) == 18 &&
              sizeof(BlockMXFP4) == 17 && sizeof(BlockQ2_K) == 84 && sizeof(BlockQ3_K) == 110 &&
              sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);

// What decoding writes. bfloat16 and float16 are rounded to nearest even, denormals kept.
enum class DecodedType : int { float32, float16, bfloat16 };

// ---- one table per instruction set, defined in block_kernels.cpp

struct BlockFormat {
  const char* name;  // as in GGUF
  int weights;       // per block
  size_t bytes;      // per block
  // Blocks [0, num_blocks) one after another; `out` is aligned to its element.
  void (*decode)(const void* blocks, int64_t num_blocks, DecodedType type, void* out);
};

struct BlockKernels {
  const BlockFormat* formats;
  int num_formats;
};

}  // namespace vivace
