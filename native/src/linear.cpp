// Linear layers: cuts groups of matrices into work items. No output depends on how.
#include "linear.h"

#include <algorithm>
#include <numeric>

#include "buffer.h"
#include "ops.h"
#include "pool.h"

namespace vivace {

namespace {

constexpr int32_t kManyRows = 16;  // from here on, a matrix product; below, a stream of weights
constexpr size_t kStreamItemBytes = 128 << 10;  // of W per item, where reading it is the cost
constexpr size_t kPairedItemBytes = 640 << 10;  // the same of each of two parts: long runs are fast
constexpr int32_t kPairedItems = 16, kPairedItemsPerThread = 4;  // but about so many at least
constexpr int32_t kMaxBlockRows = 256;                           // rows of x per item
constexpr int32_t kItemOutputs = 48;  // rows of W per item, where arithmetic is the cost
constexpr int32_t kItemCodes = 192;   // the same, of codes
static_assert(kItemCodes % (kPanels * kPanelOutputs) == 0, "items are whole units");
constexpr size_t kBlockBytes = 192 << 10;  // of x per item, beside codes: both stay in L2

struct Cut {
  int32_t item_rows, item_outputs;  // of x and of W per item
  int32_t row_blocks;
  int64_t items_per_block;

  int64_t num_items() const { return row_blocks * items_per_block; }
};

// Parts that are computed together count as one.
int32_t num_parts(const LinearJob& job) {
  return job.is_paired ? 1 : job.num_parts;
}

int32_t round_up(int32_t size, int32_t unit) {
  return (size + unit - 1) / unit * unit;
}

// How a part is cut into work items.
Cut cut(const LinearJob& job, const LinearPart& part, int threads) {
  Cut cut;
  if (job.M < kManyRows) {
    // A multiple of what every kernel takes at once.
    const bool is_row_major = unit_outputs(part.format) == 1;
    const int32_t tile = is_row_major ? (job.M <= 3 ? 8 : 6) : kPanels * kPanelOutputs;
    const size_t unit = unit_bytes(part.format, job.K);
    const size_t row = std::max<size_t>(1, unit / unit_outputs(part.format));
    const size_t most = job.is_paired ? kPairedItemBytes : kStreamItemBytes;
    const int32_t items = std::max(kPairedItems, kPairedItemsPerThread * threads);
    const int32_t limit = job.is_paired ? part.rows / items : 4096;
    const auto outputs = std::min(static_cast<int32_t>(most / row), limit);
    cut.item_outputs = std::max(outputs / tile * tile, tile);
    cut.item_rows = std::max(job.M, 1);
  } else {
    int32_t most = kMaxBlockRows;
    if (unit_outputs(part.format) > 1)
      most = std::clamp(static_cast<int32_t>(kBlockBytes / job.x_stride) / 8 * 8, 32, most);
    const int32_t wanted = (job.M + most - 1) / most;
    cut.item_outputs = unit_outputs(part.format) == 1 ? kItemOutputs : kItemCodes;
    cut.item_rows = round_up((job.M + wanted - 1) / wanted, 8);
  }
  if (job.align > 1)
    cut.item_outputs = round_up(cut.item_outputs, std::lcm(job.align, unit_outputs(part.format)));
  cut.row_blocks = (job.M + cut.item_rows - 1) / cut.item_rows;
  cut.items_per_block = (part.rows + cut.item_outputs - 1) / cut.item_outputs;
  return cut;
}

// Of an item whose outputs are not kept.
size_t output_bytes(const LinearJob& job, const Cut& cut) {
  if (job.y != nullptr) return 0;
  const size_t size = static_cast<size_t>(cut.item_rows) * cut.item_outputs * sizeof(float);
  return (size * (job.is_paired ? 2 : 1) + 63) / 64 * 64;
}

int64_t num_items(const LinearJob& job, int threads) {
  int64_t items = 0;
  for (int32_t i = 0; i < num_parts(job); ++i) items += cut(job, job.parts[i], threads).num_items();
  return items;
}

// Where outputs from `row` on lie, null if there is none.
const char* address(const LinearPart& part, int32_t K, int32_t row) {
  if (row >= part.rows) return nullptr;
  const auto units = static_cast<size_t>(row / unit_outputs(part.format));
  return static_cast<const char*>(part.weight) + units * unit_bytes(part.format, K);
}

// `next`: where this thread will read on.
void multiply(const Kernels& kernels, const LinearJob& job, const LinearPart& part,
              const OutputRange& range, float* y, const void* next, char* scratch) {
  const Format& format = part.format;
  LinearItem work;
  work.K = job.K;
  work.weight = address(part, job.K, range.first);
  work.bias = part.bias ? part.bias + range.first : nullptr;
  work.rows = range.last - range.first;
  work.x = static_cast<const char*>(job.x) + range.first_row * job.x_stride + part.input_at;
  work.x_stride = job.x_stride;
  work.M = range.last_row - range.first_row;
  work.y = y;
  work.ldy = range.stride;
  work.scratch = scratch;
  work.next = next;
  if (is_float(format))
    kernels.linear->multiply(format, work);
  else if (is_decoded(format))
    kernels.table->multiply(format, work);
  else
    kernels.integer->multiply(format, work);
}

void run_item(const Kernels& kernels, const LinearJob& job, int64_t item, int threads, int thread,
              char* scratch) {
  int32_t index = 0;
  int64_t offset = 0;
  Cut cuts = cut(job, job.parts[0], threads);
  while (item >= cuts.num_items()) {
    item -= cuts.num_items();
    offset += job.parts[index].rows;
    cuts = cut(job, job.parts[++index], threads);
  }
  const LinearPart& part = job.parts[index];
  OutputRange range;
  range.part = index;
  // All rows of x meet some rows of W before the next of W are read.
  range.first = static_cast<int32_t>(item / cuts.row_blocks) * cuts.item_outputs;
  range.last = std::min(range.first + cuts.item_outputs, part.rows);
  range.first_row = static_cast<int32_t>(item % cuts.row_blocks) * cuts.item_rows;
  range.last_row = std::min(range.first_row + cuts.item_rows, job.M);
  if (job.y != nullptr) {
    range.y = job.y + range.first_row * job.ldy + offset + range.first;
    range.paired = job.is_paired ? range.y + part.rows : nullptr;
    range.stride = job.ldy;
  } else {
    range.y = reinterpret_cast<float*>(scratch);
    range.paired = job.is_paired ? range.y + cuts.item_outputs : nullptr;
    range.stride = int64_t{cuts.item_outputs} * (job.is_paired ? 2 : 1);
    scratch += output_bytes(job, cuts);
  }
  const char* next = address(part, job.K, range.last);
  if (job.is_paired) {
    const LinearPart& other = job.parts[1];
    multiply(kernels, job, part, range, range.y, address(other, job.K, range.first), scratch);
    multiply(kernels, job, other, range, range.paired, next, scratch);
  } else {
    multiply(kernels, job, part, range, range.y, next, scratch);
  }
  if (job.then) (*job.then)(range, thread);
}

}  // namespace

size_t scratch_bytes(const Format& format, int32_t K) {
  if (is_decoded(format)) return kDecodedOutputs * decoded_stride(K) * sizeof(uint16_t);
  if (is_float(format) || format.storage == Storage::codes) return 0;
  // A byte for each of 16 outputs, and a float32 scale and minimum for each group.
  const size_t codes = static_cast<size_t>(K) * kPanelOutputs;
  return codes + codes / static_cast<size_t>(format.input.group) * 2 * sizeof(float);
}

void prepare_input(const Kernels& kernels, const InputFormat& input, int32_t K, int32_t first,
                   int32_t last, const float* row, void* out) {
  if (input.type == InputType::int8)
    kernels.integer->prepare(input, K, first, last, row, out);
  else
    kernels.linear->prepare(input.type, first, last, row, out);
}

void read_row(const Kernels& kernels, const Format& format, int32_t K, const void* matrix,
              int64_t row, float factor, float* y) {
  const int32_t outputs = unit_outputs(format);
  const char* unit =
      static_cast<const char*>(matrix) + static_cast<size_t>(row / outputs) * unit_bytes(format, K);
  if (is_float(format))
    kernels.ops->widen(format.storage, unit, factor, y, K);
  else if (is_decoded(format))
    kernels.table->read_row(format, K, unit, factor, y);
  else
    kernels.integer->read_row(format, K, unit, static_cast<int>(row % outputs), factor, y);
}

void linear(const Kernels& kernels, Pool& pool, LinearJob* jobs, int64_t num_jobs) {
  int64_t items = 0;
  size_t scratch_size = 0;  // of a thread
  for (LinearJob* job = jobs; job != jobs + num_jobs; ++job) {
    job->first_item = items;
    if (job->M > 0) items += num_items(*job, pool.threads());
    for (const LinearPart* part = job->parts; part != job->parts + job->num_parts; ++part) {
      const Cut cuts = cut(*job, job->is_paired ? job->parts[0] : *part, pool.threads());
      scratch_size =
          std::max(scratch_size, output_bytes(*job, cuts) + scratch_bytes(part->format, job->K));
    }
  }
  thread_local Buffer<char> buffer;  // kept for the next call
  buffer.reserve(scratch_size * static_cast<size_t>(pool.threads()));
  char* scratch = buffer.data();  // of the calling thread
  pool.parallel(items, [&](int64_t item, int thread) {
    const LinearJob* next =
        std::upper_bound(jobs, jobs + num_jobs, item,
                         [](int64_t at, const LinearJob& job) { return at < job.first_item; });
    run_item(kernels, next[-1], item - next[-1].first_item, pool.threads(), thread,
             scratch + scratch_size * static_cast<size_t>(thread));
  });
}

}  // namespace vivace
