#include "experts.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "sampler.h"

namespace vivace {

namespace {

// Of rows whose visits are held at a time: enough for experts to be read for many rows at once.
constexpr int64_t kMaxRows = 512, kMaxVisits = 4096;
// Items of about ten microseconds; a step of one row runs in the calling thread alone.
constexpr int64_t kRouteRows = 8, kGatherRows = 4, kActivationVisits = 2, kCombineRows = 2;

int64_t num_tiles(int64_t size) {
  return (size + 63) / 64;
}

// The sum of exp(x - top), which `y` gets one by one if it is not null. `sums` [num_tiles(size)].
float sum_exp(const OpKernels& ops, const float* x, float top, float* y, int64_t size,
              float* sums) {
  ops.exp_sums(x, top, 1.0f, y, sums, size);
  float total = 0.0f;
  for (int64_t i = 0; i < num_tiles(size); ++i) total += sums[i];
  return total;
}

// The routings of blocks.py. `logits` [num_routed] are finite and may be overwritten; `experts` and
// `weights` [num_active] are in order of rank; `scratch` [num_routed + num_tiles(num_routed)].
void route_row(const OpKernels& ops, const Block& block, float* logits, float* scratch,
               int32_t* experts, float* weights) {
  const int size = block.num_routed(), count = block.num_active;
  float *near = scratch, *sums = scratch + size;
  if (block.routing != Routing::sparse_mixer) {
    largest(logits, size, count, experts, weights);
    const float top = weights[0];
    const float chosen = sum_exp(ops, weights, top, weights, count, sums);
    const float total = block.routing == Routing::softmax_chosen
                            ? chosen
                            : sum_exp(ops, logits, top, nullptr, size, sums);
    for (int rank = 0; rank < count; ++rank) weights[rank] /= total;
    return;
  }
  constexpr float kOut = -std::numeric_limits<float>::infinity();
  for (int rank = 0; rank < count; ++rank) {
    float top;
    largest(logits, size, 1, experts + rank, &top);
    for (int i = 0; i < size; ++i) {
      const float scale = std::max(std::fabs(logits[i]), top);
      near[i] = top - logits[i] > 2.0f * block.jitter * scale ? kOut : logits[i];
    }
    weights[rank] = 1.0f / sum_exp(ops, near, top, nullptr, size, sums);
    logits[experts[rank]] = kOut;
  }
}

float sigmoid(const OpKernels& ops, float x) {
  float decay, sum;
  ops.exp_sums(&x, 0.0f, -1.0f, &decay, &sum, 1);
  return 1.0f / (1.0f + decay);
}

}  // namespace

bool Experts::run(ExpertsCall call) {
  num_visits_ = call.block.num_active + call.block.has_shared;
  const int64_t most = std::clamp<int64_t>(kMaxVisits / num_visits_, 1, kMaxRows);
  const int64_t end = call.num_rows;
  const int32_t hidden = call.block.in.in_features;
  for (int64_t first = 0; first < end; first += most) {
    call.num_rows = std::min(most, end - first);
    reserve(call);
    if (!route(call)) return false;
    sort(call);
    gather(call);
    multiply(call, &Expert::gate_up);
    activate(call);
    multiply(call, &Expert::down);
    combine(call);
    call.input += call.num_rows * call.block.in.input.bytes;
    call.out += call.num_rows * hidden;
  }
  return true;
}

void Experts::reserve(const ExpertsCall& call) {
  const Block& block = call.block;
  input_width_ = block.in.input.bytes;
  value_width_ = block.in.in_features;
  for (const Expert& expert : block.experts) {
    input_width_ = std::max(input_width_, expert.down.input.bytes);
    value_width_ = std::max<int64_t>(value_width_, expert.gate_up.out_features());
  }
  const size_t rows = call.num_rows, visits = rows * num_visits_;
  experts_.reserve(visits);
  places_.reserve(visits);
  weights_.reserve(visits);
  logits_.reserve(rows * block.in.out_features());
  const int size = block.num_routed();
  scratch_.reserve(call.pool.threads() * (size + num_tiles(size)));
  inputs_.reserve(visits * input_width_);
  values_.reserve(visits * value_width_);
}

// Each row's experts and their weights.
bool Experts::route(const ExpertsCall& call) {
  const Block& block = call.block;
  const OpKernels& ops = *call.kernels.ops;
  const int size = block.num_routed(), width = block.in.out_features();
  LinearJob job = block.in.job(call.input, call.num_rows, logits_.data(), width);
  linear(call.kernels, call.pool, &job, 1);
  std::atomic<bool> finite = true;
  call.pool.for_rows(call.num_rows, kRouteRows, [&](int64_t row, int thread) {
    float* logits = logits_.data() + row * width;
    int32_t* experts = experts_.data() + row * num_visits_;
    float* weights = weights_.data() + row * num_visits_;
    if (!ops.is_finite(Storage::float32, logits, width)) {
      finite = false;
      return;
    }
    route_row(ops, block, logits, scratch_.data() + thread * (size + num_tiles(size)), experts,
              weights);
    if (!block.has_shared) return;
    experts[block.num_active] = size;
    weights[block.num_active] = block.has_shared_gate ? sigmoid(ops, logits[size]) : 1.0f;
  });
  return finite;
}

// Gives every visit its place.
void Experts::sort(const ExpertsCall& call) {
  const int64_t visits = call.num_rows * num_visits_;
  const int32_t* experts = experts_.data();
  // Counts stand two further, so that counting places up turns each one's start into the next's.
  starts_.assign(call.block.experts.size() + 2, 0);
  for (int64_t i = 0; i < visits; ++i) ++starts_[experts[i] + 2];
  for (size_t i = 2; i < starts_.size(); ++i) starts_[i] += starts_[i - 1];
  for (int64_t i = 0; i < visits; ++i) places_.data()[i] = starts_[experts[i] + 1]++;
}

char* Experts::input_of(int32_t expert, int64_t place, size_t row_bytes) const {
  const int64_t start = starts_[expert];
  return inputs_.data() + start * input_width_ + (place - start) * row_bytes;
}

void Experts::gather(const ExpertsCall& call) {
  const size_t row_bytes = call.block.in.input.bytes;
  call.pool.for_rows(call.num_rows, kGatherRows, [&](int64_t row, int) {
    for (int64_t i = row * num_visits_; i < (row + 1) * num_visits_; ++i)
      std::memcpy(input_of(experts_.data()[i], places_.data()[i], row_bytes),
                  call.input + row * row_bytes, row_bytes);
  });
}

// Values of all visits from their inputs.
void Experts::multiply(const ExpertsCall& call, Linear Expert::* linear) {
  jobs_.clear();
  for (size_t i = 0; i < call.block.experts.size(); ++i) {
    const int64_t start = starts_[i], count = starts_[i + 1] - start;
    if (count > 0)
      jobs_.push_back((call.block.experts[i].*linear)
                          .job(inputs_.data() + start * input_width_, count,
                               values_.data() + start * value_width_, value_width_));
  }
  vivace::linear(call.kernels, call.pool, jobs_.data(), static_cast<int64_t>(jobs_.size()));
}

void Experts::activate(const ExpertsCall& call) {
  const Block& block = call.block;
  call.pool.for_rows(call.num_rows * num_visits_, kActivationVisits, [&](int64_t i, int) {
    const int32_t index = experts_.data()[i];
    const Expert& expert = block.experts[index];
    const int32_t inner = expert.down.in_features;
    float* gate = values_.data() + places_.data()[i] * value_width_;
    call.kernels.ops->activate(block.activation, gate, expert.is_gated() ? gate + inner : nullptr,
                               gate, inner);
    prepare_row(call.kernels, expert.down, gate,
                input_of(index, places_.data()[i], expert.down.input.bytes));
  });
}

void Experts::combine(const ExpertsCall& call) {
  const int32_t hidden = call.block.in.in_features;
  call.pool.for_rows(call.num_rows, kCombineRows, [&](int64_t row, int) {
    float* out = call.out + row * hidden;
    std::memset(out, 0, hidden * sizeof(float));
    for (int64_t i = row * num_visits_; i < (row + 1) * num_visits_; ++i)
      call.kernels.ops->add(out, values_.data() + places_.data()[i] * value_width_,
                            weights_.data()[i], hidden);
  });
}

}  // namespace vivace
