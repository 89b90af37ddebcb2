// Linear layers: y = x W^T + b for a group of matrices that read the same input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace vivace {

class Pool;

// How a weight is stored, and what its input is rounded to before it is multiplied. Products are
// exact and sums are float32 in every format. Names as in techniques/weight_formats (`kernel`).
enum class Format : int {
  float32,
  bfloat16,          // inputs rounded to bfloat16
  bfloat16_float32,  // inputs stay float32
  float16,           // inputs rounded to float16
  float16_float32,   // inputs stay float32
};
inline constexpr int kNumFormats = 5;

// Throws std::invalid_argument for an unknown name.
Format format_from_name(const char* name);
const char* format_name(Format format);
size_t weight_bytes(Format format);  // of one element

struct LinearPart {
  const void* weight;  // [rows][K] row-major, aligned to its element only, never read past its end
  const float* bias;   // [rows] or null
  int32_t rows;
};

// A group of matrices and the rows that it reads.
struct LinearJob {
  const LinearPart* parts;
  int32_t num_parts;
  int32_t K;
  const void* x;  // [M] prepared rows, input_bytes() apart
  int32_t M;
  float* y;  // [M, outputs of all parts], rows ldy apart
  int64_t ldy;

  // Set by linear(): its work items, in blocks of rows of x and, inside one, of rows of W.
  int32_t item_rows = 0, item_outputs = 0;
  int64_t items_per_block = 0, first_item = 0;
};

// Stride in bytes from one prepared row to the next: a multiple of 64, and an odd one, so that the
// same column of many rows does not fall into one cache set.
size_t input_bytes(Format format, int32_t K);

// Prepares one row: float32 [K] -> what the kernel reads, padded with zeros to a multiple of 64
// bytes (the rest of input_bytes() is not touched). Must run inside a FloatEnvironment.
void prepare_input(const Kernels& kernels, Format format, int32_t K, const float* row, void* out);

// y[m * ldy + offset of part + n] = sum over k of x[m][k] * W[n][k] + bias[n] for m in [0, M), for
// all jobs at once. The bits of an output depend on its row of x, its row of W, K and the format,
// and on nothing else.
void linear(const Kernels& kernels, Pool& pool, Format format, LinearJob* jobs, int64_t num_jobs);

// ---- one table per instruction set, defined in linear_kernels.cpp

struct LinearKernels {
  void (*prepare)(Format format, int32_t K, const float* row, void* out);
  // Rows [0, rows) of one matrix times rows [0, M) of x. `next` (or null) is where this thread will
  // probably read weights after that: only a hint for the cache.
  void (*multiply)(Format format, int32_t K, const void* weight, const float* bias, int32_t rows,
                   const void* x, size_t x_stride, int32_t M, float* y, int64_t ldy,
                   const void* next);
  // Repeats register-only multiply-adds; returns the number of floating-point operations.
  double (*peak)(bool bf16, int64_t rounds);
  // Reads `bytes` (a multiple of 4096) in one of several ways; returns something that depends on
  // it.
  uint64_t (*read)(int variant, const void* data, size_t bytes);
  int num_read_variants;
};

}  // namespace vivace
