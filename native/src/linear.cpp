// Linear layers: cuts groups of matrices into work items, by shapes alone.
#include "linear.h"

#include <algorithm>

#include "buffer.h"
#include "ops.h"
#include "pool.h"

namespace vivace {

namespace {

constexpr int32_t kManyRows = 16;  // from here on, a matrix product; below, a stream of weights
constexpr size_t kStreamItemBytes = 128 << 10;  // of W per item, where reading it is the cost
constexpr int32_t kMaxBlockRows = 256;          // rows of x per item
constexpr int32_t kItemOutputs = 48;            // rows of W per item, where arithmetic is the cost

struct Cut {
  int32_t item_rows, item_outputs;  // of x and of W per item
  int32_t row_blocks;
  int64_t items_per_block;

  int64_t num_items() const { return row_blocks * items_per_block; }
};

// How one part is cut into work items.
Cut cut(const LinearPart& part, int32_t K, int32_t M) {
  Cut cut;
  if (M < kManyRows) {
    // A multiple of what every kernel takes at once.
    const int32_t tile = is_float(part.format) ? (M <= 3 ? 8 : 6) : kPanelOutputs;
    const size_t row = std::max<size_t>(1, unit_bytes(part.format, K) / unit_outputs(part.format));
    const auto outputs = static_cast<int32_t>(std::min<size_t>(kStreamItemBytes / row, 4096));
    cut.item_outputs = std::max(outputs / tile * tile, tile);
    cut.item_rows = std::max(M, 1);
  } else {
    const int32_t wanted = (M + kMaxBlockRows - 1) / kMaxBlockRows;
    cut.item_outputs = kItemOutputs;
    cut.item_rows = ((M + wanted - 1) / wanted + 3) / 4 * 4;
  }
  cut.row_blocks = (M + cut.item_rows - 1) / cut.item_rows;
  cut.items_per_block = (part.rows + cut.item_outputs - 1) / cut.item_outputs;
  return cut;
}

int64_t num_items(const LinearJob& job) {
  int64_t items = 0;
  for (int32_t i = 0; i < job.num_parts; ++i) items += cut(job.parts[i], job.K, job.M).num_items();
  return items;
}

void run_item(const Kernels& kernels, const LinearJob& job, int64_t item, int threads) {
  const LinearPart* part = job.parts;
  int64_t offset = 0;
  Cut cuts = cut(*part, job.K, job.M);
  for (; item >= cuts.num_items(); cuts = cut(*++part, job.K, job.M)) {
    item -= cuts.num_items();
    offset += part->rows;
  }
  const auto m = static_cast<int32_t>(item / cuts.items_per_block) * cuts.item_rows;
  const auto n = static_cast<int32_t>(item % cuts.items_per_block) * cuts.item_outputs;
  const Format& format = part->format;
  const size_t unit = unit_bytes(format, job.K);
  const int32_t outputs = unit_outputs(format);
  const auto address = [&](int64_t row) {
    return static_cast<const char*>(part->weight) + static_cast<size_t>(row / outputs) * unit;
  };
  // Items are claimed in order, so with every thread at work this one's next is `threads` further.
  const int64_t ahead = int64_t{n} + int64_t{cuts.item_outputs} * threads;
  LinearItem work;
  work.K = job.K;
  work.weight = address(n);
  work.bias = part->bias ? part->bias + n : nullptr;
  work.rows = std::min(cuts.item_outputs, part->rows - n);
  work.x = static_cast<const char*>(job.x) + m * job.x_stride + part->input_at;
  work.x_stride = job.x_stride;
  work.M = std::min(cuts.item_rows, job.M - m);
  work.y = job.y + m * job.ldy + offset + n;
  work.ldy = job.ldy;
  thread_local Buffer<char> scratch;
  scratch.reserve(scratch_bytes(format, job.K));
  work.scratch = scratch.data();
  work.next = ahead + kPanelOutputs > part->rows ? nullptr : address(ahead);
  if (is_float(format))
    kernels.linear->multiply(format, work);
  else
    kernels.integer->multiply(format, work);
}

}  // namespace

size_t scratch_bytes(const Format& format, int32_t K) {
  if (is_float(format) || format.storage == Storage::codes) return 0;
  // A byte for each of 16 outputs, and a float32 scale and minimum for each group.
  const size_t codes = static_cast<size_t>(K) * kPanelOutputs;
  return codes + codes / static_cast<size_t>(format.input.group) * 2 * sizeof(float);
}

void prepare_input(const Kernels& kernels, const InputFormat& input, int32_t K, const float* row,
                   void* out) {
  if (input.type == InputType::int8)
    kernels.integer->prepare(input, K, row, out);
  else
    kernels.linear->prepare(input.type, K, row, out);
}

void read_row(const Kernels& kernels, const Format& format, int32_t K, const void* matrix,
              int64_t row, float factor, float* y) {
  const int32_t outputs = unit_outputs(format);
  const char* unit =
      static_cast<const char*>(matrix) + static_cast<size_t>(row / outputs) * unit_bytes(format, K);
  if (is_float(format))
    kernels.ops->widen(format.storage, unit, factor, y, K);
  else
    kernels.integer->read_row(format, K, unit, static_cast<int>(row % outputs), factor, y);
}

void linear(const Kernels& kernels, Pool& pool, LinearJob* jobs, int64_t num_jobs) {
  int64_t items = 0;
  for (LinearJob* job = jobs; job != jobs + num_jobs; ++job) {
    job->first_item = items;
    if (job->M > 0) items += num_items(*job);
  }
  pool.parallel(items, [&](int64_t item, int) {
    const LinearJob* next =
        std::upper_bound(jobs, jobs + num_jobs, item,
                         [](int64_t at, const LinearJob& job) { return at < job.first_item; });
    run_item(kernels, next[-1], item - next[-1].first_item, pool.threads());
  });
}

}  // namespace vivace
