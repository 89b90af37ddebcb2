#include "program.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <string>

#include "check.h"
#include "native_error.h"
#include "sampler.h"

namespace vivace {

namespace {

constexpr int64_t kNormRows = 8;   // items of about ten microseconds
constexpr int64_t kMlpRows = 512;  // rows whose inputs of an MLP's last linear are held at a time
constexpr int32_t kMostAligned =
    512;  // outputs of an item that ends between heads and between units

[[noreturn]] void fail_not_finite(const char* what, int index) {
  throw NativeError(std::string("the ") + what + " of block " + std::to_string(index) +
                    " are NaN or infinite: activations overflowed; the weights or the input are "
                    "damaged, or a technique broke them");
}

// Decides how the inputs of a block's linears are prepared; those that read the same share it.
void share_inputs(Block& block) {
  if (!block.out.parts.empty()) share_input({&block.out});
  for (Expert& expert : block.experts) share_input({&expert.down});
  std::vector<Linear*> first;
  if (!block.in.parts.empty()) first.push_back(&block.in);
  for (Expert& expert : block.experts) first.push_back(&expert.gate_up);
  share_input(first);
}

class Flag {
 public:
  explicit Flag(std::atomic<bool>& flag) : flag_(flag) {
    if (flag.exchange(true))
      throw NativeError("a step is running: one program does one thing at a time");
  }
  ~Flag() { flag_ = false; }

 private:
  std::atomic<bool>& flag_;
};

}  // namespace

Program::Program(const Kernels& kernels, std::shared_ptr<Pool> pool, int hidden_size,
                 int vocab_size, KVType kv_type)
    : kernels_(kernels),
      pool_(std::move(pool)),
      hidden_size_(hidden_size),
      vocab_size_(vocab_size),
      kv_type_(kv_type),
      scratch_width_(hidden_size) {}

void Program::set_rope(size_t index, const Rope& rope) {
  Flag busy(is_running_);
  if (index > ropes_.size()) throw NativeError("ropes are set in order");
  if (index == ropes_.size()) ropes_.emplace_back();
  ropes_[index] = rope;
}

// Makes room for the inputs of a linear.
void Program::measure(const Linear& linear) {
  input_width_ = std::max(input_width_, linear.input.bytes);
  scratch_width_ = std::max<size_t>(scratch_width_, linear.in_features);
}

void Program::set_head(Head head) {
  check_linear(head.linear, hidden_size_, "head");
  if (head.linear.out_features() != vocab_size_)
    throw NativeError("the head gives " + std::to_string(head.linear.out_features()) +
                      " logits, expected " + std::to_string(vocab_size_));
  share_input({&head.linear});
  measure(head.linear);
  head_ = std::move(head);
}

void Program::add_block(Block block) {
  check_block(block, {hidden_size_, vocab_size_, ropes_, groups_});
  share_inputs(block);
  measure(block.first());
  measure(block.out);
  if (block.kind == BlockKind::mlp)
    down_width_ = std::max(down_width_, block.experts[0].down.input.bytes);
  max_heads_ = std::max<size_t>(max_heads_, block.num_heads);
  blocks_.push_back(std::move(block));
}

void Program::set_site(int64_t block, Site site) {
  Flag busy(is_running_);
  if (block < 0 || block >= static_cast<int64_t>(blocks_.size()))
    throw NativeError("there is no block " + std::to_string(block));
  blocks_[block].site = std::move(site);
}

void Program::allocate(const std::vector<int64_t>& num_blocks, int block_size) {
  Flag busy(is_running_);
  if (num_blocks.size() != groups_.size())
    throw NativeError("allocate needs " + std::to_string(groups_.size()) +
                      " block counts, one per layer group");
  caches_.clear();
  for (size_t i = 0; i < groups_.size(); ++i)
    caches_.push_back(std::make_unique<KVCache>(kv_type_, groups_[i].num_layers,
                                                groups_[i].num_kv_heads, groups_[i].head_dim,
                                                num_blocks[i], block_size));
}

KVCache& Program::cache(int64_t group) {
  if (is_running_) throw NativeError("a step is running: its cache cannot be touched");
  if (group < 0 || group >= static_cast<int64_t>(caches_.size()))
    throw NativeError("layer group " + std::to_string(group) + " has no cache");
  return *caches_[group];
}

// ---------------------------------------------------------------- a step

bool Program::run(const StepArrays& step) {
  Flag busy(is_running_);
  check_step(step, embedding_, blocks_, {hidden_size_, vocab_size_, ropes_, groups_}, caches_);
  if (step.num_rows == 0) return false;
  FloatEnvironment environment;
  reserve(step);
  embed(step);
  float* sums = step.attention_sums;
  const int writer = last_writer(step);
  const StepArrays* now = &step;
  for (int index = step.first_block; index < step.last_block; ++index) {
    if (step.cancel && std::atomic_ref<const int32_t>(*step.cancel).load()) return true;
    Block& block = blocks_[index];
    if (block.kind == BlockKind::attention) {
      project(step, index);
      if (index == writer && narrow(step, index)) now = &narrowed_;
      if (now->num_rows == 0) return false;
      attend(*now, block, sums);
      if (sums)
        for (const Span& span : step.groups[block.group].spans)
          sums += block.num_heads * span.num_entries;
    } else {
      run_rows(*now, index);
    }
    if (block.site && !block.site(core_.data(), now->num_rows, hidden_size_)) return true;
    finish_block(*now, index);
  }
  if (step.last_block == static_cast<int>(blocks_.size())) run_head(*now);
  return false;
}

// The last block that writes keys and values, if the rows after it may be narrowed: none of what
// comes after looks at all rows. -1 otherwise.
int Program::last_writer(const StepArrays& step) const {
  if (step.last_block != static_cast<int>(blocks_.size()) || step.attention_sums) return -1;
  for (int index = step.last_block - 1; index >= step.first_block; --index) {
    const Block& block = blocks_[index];
    if (block.site) return -1;
    if (block.kind != BlockKind::attention) continue;
    for (const Segment& segment : step.groups[block.group].segments)
      if (segment.tree) return -1;  // a tree's rows are counted from the span's first
    return index;
  }
  return -1;
}

// Rows whose results nobody wants are done once their keys and values are written: move the others
// together and describe them in `narrowed_`. False if all rows go on.
bool Program::narrow(const StepArrays& step, int index) {
  const Block& block = blocks_[index];
  std::vector<int32_t> place(step.num_rows, -1);
  for (int64_t i = 0; i < step.num_logits; ++i) place[step.logits_rows[i]] = 0;
  for (const HiddenWant& want : step.hidden)
    if (want.block >= index)
      for (int64_t i = 0; i < want.num_rows; ++i) place[want.rows[i]] = 0;
  kept_rows_.clear();
  kept_positions_.clear();
  for (int64_t row = 0; row < step.num_rows; ++row) {
    if (place[row] < 0) continue;
    place[row] = static_cast<int32_t>(kept_rows_.size());
    kept_rows_.push_back(static_cast<int32_t>(row));
    kept_positions_.push_back(step.positions[row]);
  }
  const auto count = static_cast<int64_t>(kept_rows_.size());
  if (count == step.num_rows) return false;

  const int64_t width = block.in.out_features(), queries = block.num_heads * block.head_dim;
  for (int64_t i = 0; i < count; ++i) {  // to the front, so nothing is overwritten before it moves
    const int64_t row = kept_rows_[i];
    std::memmove(work_.data() + i * width, work_.data() + row * width, queries * sizeof(float));
    std::memmove(hidden_.data() + i * hidden_size_, hidden_.data() + row * hidden_size_,
                 hidden_size_ * sizeof(float));
  }
  const auto renumber = [&](const int32_t* rows, int64_t size, std::vector<int32_t>& to) {
    to.resize(size);
    for (int64_t i = 0; i < size; ++i) to[i] = place[rows[i]];
    return to.data();
  };
  narrowed_ = {};
  narrowed_.num_rows = count;
  narrowed_.positions = kept_positions_.data();
  narrowed_.logits_rows = renumber(step.logits_rows, step.num_logits, kept_logits_rows_);
  narrowed_.num_logits = step.num_logits;
  narrowed_.logits = step.logits;
  narrowed_.num_top = step.num_top;
  narrowed_.top_ids = step.top_ids;
  narrowed_.top_logits = step.top_logits;
  narrowed_.first_block = step.first_block;
  narrowed_.last_block = step.last_block;
  kept_hidden_rows_.resize(step.hidden.size());
  for (size_t i = 0; i < step.hidden.size(); ++i) {
    HiddenWant want = step.hidden[i];
    if (want.block < index) continue;  // taken already
    want.rows = renumber(want.rows, want.num_rows, kept_hidden_rows_[i]);
    narrowed_.hidden.push_back(want);
  }
  narrowed_.groups.resize(step.groups.size());
  for (Span span : step.groups[block.group].spans) {
    const auto first = std::lower_bound(kept_rows_.begin(), kept_rows_.end(), span.first_row);
    const auto last = std::lower_bound(first, kept_rows_.end(), span.first_row + span.num_rows);
    if (first == last) continue;
    span.first_row = first - kept_rows_.begin();
    span.num_rows = last - first;
    narrowed_.groups[block.group].spans.push_back(span);
  }
  return true;
}

void Program::reserve(const StepArrays& step) {
  const size_t rows = step.num_rows;
  size_t work = 0;
  for (int index = step.first_block; index < step.last_block; ++index) {
    const Block& block = blocks_[index];
    if (block.kind == BlockKind::attention)
      work = std::max(work, rows * (block.in.out_features() + block.out.in_features));
  }
  hidden_.reserve(rows * hidden_size_);
  core_.reserve(rows * hidden_size_);
  work_.reserve(work);
  stats_.reserve(rows * max_heads_ * 2);
  input_.reserve(std::max<size_t>(rows, step.num_logits) * input_width_);
  down_input_.reserve(std::min<size_t>(rows, kMlpRows) * down_width_);
  scratch_.reserve(pool_->threads() * scratch_width_);
}

// Row `index` of a linear's input: the norm of `row`, in the forms that the linear reads.
void Program::prepare(const Norm& norm, const Linear& linear, const float* row, int64_t index,
                      int thread) {
  if (norm.kind != NormKind::none) {
    float* normed = scratch_.data() + thread * scratch_width_;
    kernels_.ops->norm(norm, row, normed);
    row = normed;
  }
  prepare_row(kernels_, linear, row, input_.data() + index * linear.input.bytes);
}

void Program::multiply(const Linear& linear, int64_t num_rows, float* y, int64_t stride) {
  LinearJob job = linear.job(input_.data(), num_rows, y, stride);
  vivace::linear(kernels_, *pool_, &job, 1);
}

void Program::embed_row(const StepArrays& step, int64_t row, int64_t given, int thread) {
  float* h = hidden_.data() + row * hidden_size_;
  if (given >= 0) {
    std::memcpy(h, step.given + given * hidden_size_, hidden_size_ * sizeof(float));
    return;
  }
  read_row(kernels_, embedding_.format, hidden_size_, embedding_.weight, step.tokens[row],
           embedding_.scale, h);
  if (!embedding_.positions) return;
  float* learned = scratch_.data() + thread * scratch_width_;
  read_row(kernels_, embedding_.positions_format, hidden_size_, embedding_.positions,
           step.positions[row], 1.0f, learned);
  kernels_.ops->add(h, learned, 1.0f, hidden_size_);
}

void Program::embed(const StepArrays& step) {
  std::vector<int64_t> given(step.num_given ? step.num_rows : 0, -1);
  for (int64_t i = 0; i < step.num_given; ++i) given[step.given_rows[i]] = i;
  pool_->for_rows(step.num_rows, kNormRows, [&](int64_t row, int thread) {
    embed_row(step, row, given.empty() ? -1 : given[row], thread);
    if (step.first_block < step.last_block)
      prepare(blocks_[step.first_block].norm, blocks_[step.first_block].first(),
              hidden_.data() + row * hidden_size_, row, thread);
  });
}

// Heads [first, last) of a row, queries before keys before values: normalized and rotated in place,
// and written into the cache. False if what is written is not finite.
bool Program::finish_heads(const StepArrays& step, const Block& block, int64_t row, int first,
                           int last, float* qkv) {
  const OpKernels& ops = *kernels_.ops;
  const int head_dim = block.head_dim, num_keys = block.num_heads + block.num_kv_heads;
  const CacheView cache = caches_[block.group]->layer(block.cache_layer);
  const int64_t slot = step.groups[block.group].slots[row];
  bool finite = true;
  for (int head = first; head < last; ++head) {
    float* x = qkv + head * head_dim;
    if (head >= num_keys) {
      finite &= kernels_.attention->write_value(cache, slot, head - num_keys, x);
      continue;
    }
    const Norm& norm = head < block.num_heads ? block.q_norm : block.k_norm;
    if (norm.kind != NormKind::none && norm.size == head_dim) ops.norm(norm, x, x);
    if (block.rope >= 0) {
      const Rope& rope = ropes_[block.rope];
      const int64_t at = static_cast<int64_t>(step.positions[row]) * rope.half;
      ops.rotate(x, rope.cos + at, rope.sin + at, rope.half, rope.is_interleaved);
    }
    if (head >= block.num_heads)
      finite &= kernels_.attention->write_key(cache, slot, head - block.num_heads, x);
  }
  return finite;
}

// Queries, keys and values of all rows; keys and values go into the cache. The thread that computed
// heads finishes them, unless a norm looks at all heads of a row.
void Program::project(const StepArrays& step, int index) {
  const Block& block = blocks_[index];
  const int64_t width = block.in.out_features();
  float* qkv = work_.data();
  std::atomic<bool> finite = true;
  LinearJob job = block.in.job(input_.data(), step.num_rows, qkv, width);
  const bool has_whole_heads = std::lcm(block.head_dim, kPanels * kPanelOutputs) <= kMostAligned &&
                               std::ranges::all_of(block.in.parts, [&](const LinearPart& part) {
                                 return part.rows % block.head_dim == 0;
                               });
  if (block.has_norm_of_heads() || !has_whole_heads) {
    vivace::linear(kernels_, *pool_, &job, 1);
    const int num_all = block.num_heads + 2 * block.num_kv_heads;
    pool_->for_rows(step.num_rows, 1, [&](int64_t row, int) {
      float* heads = qkv + row * width;
      float* keys = heads + block.num_heads * block.head_dim;
      for (auto [norm, x] : {std::pair{&block.q_norm, heads}, std::pair{&block.k_norm, keys}})
        if (norm->kind != NormKind::none && norm->size != block.head_dim)
          kernels_.ops->norm(*norm, x, x);
      if (!finish_heads(step, block, row, 0, num_all, heads)) finite = false;
    });
  } else {
    const std::function<void(const OutputRange&, int)> finish = [&](const OutputRange& range, int) {
      int64_t offset = 0;
      for (int part = 0; part < range.part; ++part) offset += block.in.parts[part].rows;
      const auto first = static_cast<int>((offset + range.first) / block.head_dim);
      const auto last = static_cast<int>((offset + range.last) / block.head_dim);
      for (int64_t row = range.first_row; row < range.last_row; ++row)
        if (!finish_heads(step, block, row, first, last, qkv + row * width)) finite = false;
    };
    job.then = &finish;
    job.align = block.head_dim;
    vivace::linear(kernels_, *pool_, &job, 1);
  }
  if (!finite) fail_not_finite("keys or values", index);
}

void Program::attend(const StepArrays& step, const Block& block, float* sums) {
  const int64_t width = block.in.out_features(), out_width = block.out.in_features;
  float* qkv = work_.data();
  float* out = qkv + step.num_rows * width;
  const GroupStep& group = step.groups[block.group];
  AttentionCall call = {};
  call.cache = caches_[block.group]->layer(block.cache_layer);
  call.queries = qkv;
  call.q_stride = width;
  call.out = out;
  call.out_stride = out_width;
  call.stats = stats_.data();
  call.positions = step.positions;
  call.spans = group.spans.data();
  call.num_spans = static_cast<int64_t>(group.spans.size());
  call.num_heads = block.num_heads;
  call.num_kv_heads = block.num_kv_heads;
  call.head_dim = block.head_dim;
  call.scale = block.scale;
  call.soft_cap = block.soft_cap;
  call.sinks = block.sinks;
  attend_.run(kernels_, *pool_, call, sums);
  pool_->for_rows(step.num_rows, kNormRows, [&](int64_t row, int thread) {
    prepare({}, block.out, out + row * out_width, row, thread);
  });
  multiply_last(block, block.out, input_.data(), 0, step.num_rows);
}

// A block whose rows do not read each other.
void Program::run_rows(const StepArrays& step, int index) {
  const Block& block = blocks_[index];
  if (block.kind == BlockKind::mlp) return run_mlp(step, block);
  if (block.kind == BlockKind::linear)
    return multiply_last(block, block.out, input_.data(), 0, step.num_rows);
  if (!experts_.run({kernels_, *pool_, block, input_.data(), step.num_rows, core_.data()}))
    fail_not_finite("router logits", index);
}

void Program::run_mlp(const StepArrays& step, const Block& block) {
  const Expert& mlp = block.experts[0];
  for (int64_t first = 0; first < step.num_rows; first += kMlpRows) {
    const int64_t rows = std::min(kMlpRows, step.num_rows - first);
    // Gates and what they open are computed together, so that each becomes an input of `down` at
    // once.
    const std::function<void(const OutputRange&, int)> activate = [&](const OutputRange& range,
                                                                      int) {
      for (int64_t row = range.first_row; row < range.last_row; ++row) {
        const int64_t at = (row - range.first_row) * range.stride;
        float* gate = range.y + at;
        kernels_.ops->activate(block.activation, gate, mlp.is_gated() ? range.paired + at : nullptr,
                               gate, range.last - range.first);
        prepare_row(kernels_, mlp.down, range.first, range.last, gate,
                    down_input_.data() + row * mlp.down.input.bytes);
      }
    };
    const Linear& gate_up = mlp.gate_up;
    LinearJob job = gate_up.job(input_.data() + first * gate_up.input.bytes, rows, nullptr, 0);
    job.then = &activate;
    job.align = kPreparedTogether;
    job.is_paired = mlp.is_gated();
    linear(kernels_, *pool_, &job, 1);
    multiply_last(block, mlp.down, down_input_.data(), first, rows);
  }
}

// A block's last linear for `rows` rows from `first` on: into `core_`, or added to the state at
// once.
void Program::multiply_last(const Block& block, const Linear& linear, const char* x, int64_t first,
                            int64_t rows) {
  float* hidden = hidden_.data() + first * hidden_size_;
  const std::function<void(const OutputRange&, int)> add = [&](const OutputRange& range, int) {
    for (int64_t row = range.first_row; row < range.last_row; ++row)
      kernels_.ops->add(hidden + row * hidden_size_ + range.first,
                        range.y + (row - range.first_row) * range.stride, block.residual_scale,
                        range.last - range.first);
  };
  LinearJob job = linear.job(x, rows, core_.data() + first * hidden_size_, hidden_size_);
  if (block.adds_at_once()) {
    job.y = nullptr;
    job.then = &add;
  }
  vivace::linear(kernels_, *pool_, &job, 1);
}

// The residual add, what was asked of the state, and the next block's input.
void Program::finish_block(const StepArrays& step, int index) {
  const Block& block = blocks_[index];
  const bool is_last = index + 1 == step.last_block;
  pool_->for_rows(step.num_rows, kNormRows, [&](int64_t row, int thread) {
    float* h = hidden_.data() + row * hidden_size_;
    float* x = core_.data() + row * hidden_size_;
    if (!block.adds_at_once()) {
      if (block.post_norm.kind != NormKind::none) kernels_.ops->norm(block.post_norm, x, x);
      kernels_.ops->add(h, x, block.residual_scale, hidden_size_);
    }
    if (!is_last) prepare(blocks_[index + 1].norm, blocks_[index + 1].first(), h, row, thread);
  });
  take_hidden(step, index);
}

void Program::take_hidden(const StepArrays& step, int index) {
  for (const HiddenWant& want : step.hidden) {
    if (want.block != index) continue;
    const bool is_final = index == static_cast<int>(blocks_.size());
    for (int64_t i = 0; i < want.num_rows; ++i) {
      const float* h = hidden_.data() + int64_t{want.rows[i]} * hidden_size_;
      float* out = want.out + i * hidden_size_;
      if (is_final && head_.norm.kind != NormKind::none)
        kernels_.ops->norm(head_.norm, h, out);
      else
        std::memcpy(out, h, hidden_size_ * sizeof(float));
    }
  }
}

void Program::run_head(const StepArrays& step) {
  take_hidden(step, static_cast<int>(blocks_.size()));
  if (step.num_logits == 0) return;
  pool_->for_rows(step.num_logits, kNormRows, [&](int64_t row, int thread) {
    prepare(head_.norm, head_.linear,
            hidden_.data() + int64_t{step.logits_rows[row]} * hidden_size_, row, thread);
  });
  multiply(head_.linear, step.num_logits, step.logits, vocab_size_);
  const bool is_plain = head_.soft_cap == 0.0f && head_.scale == 1.0f;
  if (is_plain && step.num_top == 0) return;
  pool_->for_rows(step.num_logits, 1, [&](int64_t row, int) {
    float* logits = step.logits + row * vocab_size_;
    kernels_.ops->soft_cap(logits, head_.soft_cap, head_.scale, vocab_size_);
    largest(logits, vocab_size_, step.num_top, step.top_ids + row * step.num_top,
            step.top_logits + row * step.num_top);
  });
}

}  // namespace vivace
