// Linear layers: cuts groups of matrices into work items, by shapes alone.
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

// Sets how `job` is cut into work items; returns their number.
int64_t cut(Format format, LinearJob& job) {
  if (job.M <= 0) return 0;
  int32_t blocks = 1;
  if (job.M < kManyRows) {
    size_t row = static_cast<size_t>(job.K) * weight_bytes(format);
    auto outputs = static_cast<int32_t>(std::min<size_t>(kStreamItemBytes / row, 4096));
    const int32_t tile = job.M <= 3 ? 8 : 6;  // a multiple of what every kernel takes at once
    job.item_outputs = std::max(outputs / tile * tile, tile);
    job.item_rows = job.M;
  } else {
    const int32_t wanted = (job.M + kMaxBlockRows - 1) / kMaxBlockRows;
    job.item_outputs = kItemOutputs;
    job.item_rows = ((job.M + wanted - 1) / wanted + 3) / 4 * 4;
    blocks = (job.M + job.item_rows - 1) / job.item_rows;
  }
  job.items_per_block = 0;
  for (int32_t i = 0; i < job.num_parts; ++i)
    job.items_per_block += (job.parts[i].rows + job.item_outputs - 1) / job.item_outputs;
  return blocks * job.items_per_block;
}

void run_item(const Kernels& kernels, Format format, const LinearJob& job, int64_t item,
              int threads) {
  const auto m = static_cast<int32_t>(item / job.items_per_block) * job.item_rows;
  int64_t column = item % job.items_per_block, offset = 0;
  const LinearPart* part = job.parts;
  for (;; ++part) {
    int64_t here = (part->rows + job.item_outputs - 1) / job.item_outputs;
    if (column < here) break;
    column -= here;
    offset += part->rows;
  }
  const auto first = static_cast<int32_t>(column * job.item_outputs);
  const size_t row_bytes = static_cast<size_t>(job.K) * weight_bytes(format);
  const char* weight = static_cast<const char*>(part->weight);
  // Items are claimed in order, so with every thread at work this one's next is `threads` further.
  const int64_t ahead = int64_t{first} + int64_t{job.item_outputs} * threads;
  const char* next =
      ahead + 8 > part->rows ? nullptr : weight + static_cast<size_t>(ahead) * row_bytes;
  const size_t stride = input_bytes(format, job.K);
  kernels.linear->multiply(
      format, job.K, weight + static_cast<size_t>(first) * row_bytes,
      part->bias ? part->bias + first : nullptr, std::min(job.item_outputs, part->rows - first),
      static_cast<const char*>(job.x) + m * stride, stride, std::min(job.item_rows, job.M - m),
      job.y + m * job.ldy + offset + first, job.ldy, next);
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

void linear(const Kernels& kernels, Pool& pool, Format format, LinearJob* jobs, int64_t num_jobs) {
  int64_t items = 0;
  for (LinearJob* job = jobs; job != jobs + num_jobs; ++job) {
    job->first_item = items;
    items += cut(format, *job);
  }
  pool.parallel(items, [&](int64_t item, int) {
    const LinearJob* next =
        std::upper_bound(jobs, jobs + num_jobs, item,
                         [](int64_t at, const LinearJob& job) { return at < job.first_item; });
    run_item(kernels, format, next[-1], item - next[-1].first_item, pool.threads());
  });
}

}  // namespace vivace
