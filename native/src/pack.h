// Float matrices rounded to panels of integer codes, and sums that show a damaged file.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"

namespace vivace {

class Pool;

// Up to 16 rows of a matrix, and the panel of a unit that they become.
struct PackItem {
  Storage storage;      // float32, bfloat16 or float16
  const void* weights;  // [rows][K]
  int32_t rows, K;
  uint8_t* unit;
  int panel;
};

// Defined in pack_kernels.cpp, once per instruction set. All give the same bits.
struct PackKernels {
  // Returns false if a group of finite weights has a scale that is not finite as stored; where
  // weights are not finite, neither is their scale. Must run with denormals kept.
  bool (*pack_panel)(const Format& format, const CodesLayout& layout, const PackItem& item);
};

// A 64-bit sum over bytes. It depends on nothing but them; every change within an aligned 8
// bytes changes it. No protection against an attacker.
uint64_t checksum(Pool& pool, const uint8_t* data, size_t bytes);

}  // namespace vivace
