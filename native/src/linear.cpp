// Linear layers: cuts a group of matrices into work items, by shapes alone.
#include "linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace vivace {

namespace {

constexpr const char* kFormatNames[kNumFormats] = {"float32", "bfloat16", "bfloat16_float32",
                                                   "float16", "float16_float32"};

constexpr int32_t kManyRows = 16;  // from here on, a matrix product; below, a stream of weights
constexpr size_t kStreamItemBytes = 128 << 10;  // of W per item, where reading it is the cost
constexpr int32_t kMaxBlockRows = 256;          // rows of x per item
constexpr int32_t kItemOutputs = 48;            // rows of W per item, where arithmetic is the cost

struct Cut {
  int32_t outputs;     // rows of W per item
  int32_t input_rows;  // rows of x per item
};

Cut cut(const LinearOp& op, int32_t M) {
  if (M < kManyRows) {
    size_t row = static_cast<size_t>(op.K) * weight_bytes(op.format);
    auto outputs = static_cast<int32_t>(std::min<size_t>(kStreamItemBytes / row, 4096));
    const int32_t tile = M <= 3 ? 8 : 6;  // a multiple of what every kernel takes at once
    return {std::max(outputs / tile * tile, tile), M};
  }
  int32_t blocks = (M + kMaxBlockRows - 1) / kMaxBlockRows;
  int32_t rows = (M + blocks - 1) / blocks;
  return {kItemOutputs, (rows + 3) / 4 * 4};
}

}  // namespace

Format format_from_name(const char* name) {
  for (int i = 0; i < kNumFormats; ++i)
    if (std::strcmp(kFormatNames[i], name) == 0) return static_cast<Format>(i);
  throw std::invalid_argument("no kernel for the format '" + std::string(name) +
                              "': expected float32, bfloat16, bfloat16_float32, float16 or "
                              "float16_float32");
}

const char* format_name(Format format) {
  return kFormatNames[static_cast<int>(format)];
}

size_t weight_bytes(Format format) {
  return format == Format::float32 ? 4 : 2;
}

size_t input_bytes(Format format, int32_t K) {
  size_t element = format == Format::bfloat16 ? 2 : 4;
  size_t lines = (static_cast<size_t>(K) * element + 63) / 64;
  return (lines | 1) * 64;
}

void prepare_input(const Kernels& kernels, Format format, int32_t K, const float* row, void* out) {
  kernels.linear->prepare(format, K, row, out);
}

void linear(const Kernels& kernels, Pool& pool, const LinearOp& op, const void* x, int32_t M,
            float* y, int64_t ldy) {
  if (M <= 0) return;
  const Cut size = cut(op, M);
  const size_t stride = input_bytes(op.format, op.K);
  int64_t columns = 0;
  for (int32_t i = 0; i < op.num_parts; ++i)
    columns += (op.parts[i].rows + size.outputs - 1) / size.outputs;
  const int64_t blocks = (M + size.input_rows - 1) / size.input_rows;
  pool.parallel(blocks * columns, [&](int64_t item, int) {
    const auto m = static_cast<int32_t>(item / columns) * size.input_rows;
    int64_t column = item % columns, offset = 0;
    const LinearPart* part = op.parts;
    for (;; ++part) {
      int64_t here = (part->rows + size.outputs - 1) / size.outputs;
      if (column < here) break;
      column -= here;
      offset += part->rows;
    }
    const auto first = static_cast<int32_t>(column * size.outputs);
    const char* weight = static_cast<const char*>(part->weight) +
                         static_cast<size_t>(first) * op.K * weight_bytes(op.format);
    // Items are claimed in order, so with every thread at work this one's next is `threads`
    // further.
    const int64_t ahead = int64_t{first} + int64_t{size.outputs} * pool.threads();
    const char* next = ahead + 8 > part->rows
                           ? nullptr
                           : static_cast<const char*>(part->weight) +
                                 static_cast<size_t>(ahead) * op.K * weight_bytes(op.format);
    kernels.linear->multiply(
        op.format, op.K, weight, part->bias ? part->bias + first : nullptr,
        std::min(size.outputs, part->rows - first), static_cast<const char*>(x) + m * stride,
        stride, std::min(size.input_rows, M - m), y + m * ldy + offset + first, ldy, next);
  });
}

}  // namespace vivace
