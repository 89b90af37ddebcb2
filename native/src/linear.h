// Linear layers: y = x W^T + b for a group of matrices that read the same input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "format.h"
#include "isa.h"

namespace vivace {

class Pool;

struct LinearPart {
  Format format;
  const void* weight;  // [rows][K] as the format lays it out, never read past its end
  const float* bias;   // [rows] or null
  int32_t rows;
  size_t input_at = 0;  // where in a prepared row this part's inputs lie: see share_inputs()
};

// Outputs [first, last) of a part (of both parts, if they are paired) for rows [first_row,
// last_row), at y of the first row and `stride` further with each row; the second part's at
// `paired`, if there is one.
struct OutputRange {
  int32_t part, first, last, first_row, last_row;
  float *y, *paired;
  int64_t stride;
};

// A group of matrices and the rows that it reads.
struct LinearJob {
  const LinearPart* parts;
  int32_t num_parts;
  int32_t K;
  const void* x;  // [M] prepared rows
  size_t x_stride;
  int32_t M;
  float* y;  // [M, outputs of all parts], rows ldy apart; null: only `then` sees outputs
  int64_t ldy;

  // What the thread that has computed outputs does with them at once, while they are in its cache.
  // Ranges start at multiples of `align`; paired parts, of equal size, are computed together.
  const std::function<void(const OutputRange& outputs, int thread)>* then = nullptr;
  int32_t align = 1;
  bool is_paired = false;

  int64_t first_item = 0;  // set by linear()
};

// y[m * ldy + offset of part + n] = sum over k of x[m][k] * W[n][k] + bias[n] for m in [0, M), for
// all jobs at once. The bits of an output depend on its row of x, its row of W, K and the format,
// and on nothing else.
void linear(const Kernels& kernels, Pool& pool, LinearJob* jobs, int64_t num_jobs);

// Inputs of a row that are prepared alone: ranges of them start at multiples of it.
constexpr int32_t kPreparedTogether = 128;

// Prepares inputs [first, last) of one row for one kind: float32 [last - first] -> what kernels
// read, input_bytes(input, K). Must run inside a FloatEnvironment.
void prepare_input(const Kernels& kernels, const InputFormat& input, int32_t K, int32_t first,
                   int32_t last, const float* row, void* out);

// One row of a stored matrix, times `factor`: float32 [K].
void read_row(const Kernels& kernels, const Format& format, int32_t K, const void* matrix,
              int64_t row, float factor, float* y);

// Rows [0, rows) of one matrix, from a multiple of unit_outputs() on, times rows [0, M) of x.
struct LinearItem {
  int32_t K;
  const void* weight;
  const float* bias;  // or null
  int32_t rows;
  const void* x;
  size_t x_stride;
  int32_t M;
  float* y;
  int64_t ldy;
  char* scratch;     // scratch_bytes(), aligned to 64
  const void* next;  // where this thread will probably read weights after that, or null: a hint
};

// What a thread needs to multiply many rows with a matrix of a format.
size_t scratch_bytes(const Format& format, int32_t K);

constexpr int kDecodedOutputs = 8;  // that lie decoded in scratch at once
// Elements from one to the next: whole steps, and no power of two.
constexpr size_t decoded_stride(int32_t K) {
  return (static_cast<size_t>(K) + 31) / 32 * 32 + 32;
}

// ---- tables per instruction set

struct LinearKernels {  // of float formats, defined in linear_kernels.cpp
  void (*prepare)(InputType type, int32_t first, int32_t last, const float* row, void* out);
  void (*multiply)(const Format& format, const LinearItem& item);
  // Repeats register-only multiply-adds; returns the number of floating-point operations.
  double (*peak)(bool bf16, int64_t rounds);
  // Reads `bytes` (a multiple of 4096) in one of several ways; returns something that depends on
  // it.
  uint64_t (*read)(int variant, const void* data, size_t bytes);
  int num_read_variants;
};

struct TableKernels {  // of formats that are decoded to bfloat16, defined in table_kernels.cpp
  void (*multiply)(const Format& format, const LinearItem& item);
  // A row, times `factor`.
  void (*read_row)(const Format& format, int32_t K, const void* row, float factor, float* y);
  // False if a weight of a row is NaN or infinite.
  bool (*is_finite)(const Format& format, int32_t K, const void* row);
};

struct IntegerKernels {  // of all others, defined in integer_kernels.cpp
  void (*prepare)(const InputFormat& input, int32_t K, int32_t first, int32_t last,
                  const float* row, void* out);
  void (*multiply)(const Format& format, const LinearItem& item);
  // Row `output` of a unit, times `factor`.
  void (*read_row)(const Format& format, int32_t K, const void* unit, int output, float factor,
                   float* y);
  double (*peak)(int64_t rounds);  // as LinearKernels'
};

}  // namespace vivace
