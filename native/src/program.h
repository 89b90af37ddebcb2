// The block list bound to buffers: runs a whole step in one call.
//
// A row's result never depends on other rows of the step: every operation works on one row, linears
// and attention promise it too. All keys and values of a step are written before any is read.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attend.h"
#include "blocks.h"
#include "buffer.h"
#include "experts.h"
#include "isa.h"
#include "kv_cache.h"
#include "pool.h"

namespace vivace {

struct GroupStep {
  const int64_t* slots = nullptr;  // [rows]
  std::vector<Segment> segments;
  std::vector<Span> spans;
};

struct HiddenWant {
  int block;  // the number of blocks: after the final norm
  const int32_t* rows;
  int64_t num_rows;
  float* out;  // [num_rows, hidden]
};

struct StepArrays {
  int64_t num_rows = 0;
  const int32_t* tokens = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* given_rows = nullptr;  // rows whose state is given instead of looked up
  const float* given = nullptr;         // [num_given, hidden]
  int64_t num_given = 0;
  std::vector<GroupStep> groups;
  const int32_t* logits_rows = nullptr;
  int64_t num_logits = 0;
  float* logits = nullptr;  // [num_logits, vocab]
  int64_t num_top = 0;      // largest logits per wanted row
  int32_t* top_ids = nullptr;
  float* top_logits = nullptr;
  std::vector<HiddenWant> hidden;
  float* attention_sums = nullptr;  // per attention block, span: [num_heads, entries]; or null
  int64_t num_sums = 0;
  int first_block = 0, last_block = 0;
  const int32_t* cancel = nullptr;
};

class Program {
 public:
  Program(const Kernels& kernels, std::shared_ptr<Pool> pool, int hidden_size, int vocab_size,
          KVType kv_type);

  void set_rope(size_t index, const Rope& rope);
  void add_group(const LayerGroup& group) { groups_.push_back(group); }
  void set_embedding(const Embedding& embedding) { embedding_ = embedding; }
  void set_head(Head head);
  void add_block(Block block);
  void set_site(int64_t block, Site site);

  // Both refuse while a step runs.
  void allocate(const std::vector<int64_t>& num_blocks, int block_size);
  KVCache& cache(int64_t group);

  // Returns true if the step ended early. Throws NativeError, before anything is written,
  // if the step does not fit; and halfway if a row's keys, values or router logits overflow.
  bool run(const StepArrays& step);

  const Kernels& kernels() const { return kernels_; }
  Pool& pool() { return *pool_; }
  int hidden_size() const { return hidden_size_; }
  int vocab_size() const { return vocab_size_; }
  size_t num_caches() const { return caches_.size(); }

 private:
  void measure(const Linear& linear);
  void reserve(const StepArrays& step);
  void embed_row(const StepArrays& step, int64_t row, int64_t given, int thread);
  void embed(const StepArrays& step);
  void project(const StepArrays& step, int index);
  void attend(const StepArrays& step, const Block& block, float* sums);
  int last_writer(const StepArrays& step) const;
  bool narrow(const StepArrays& step, int index);
  bool finish_heads(const StepArrays& step, const Block& block, int64_t row, int first, int last,
                    float* qkv);
  void run_rows(const StepArrays& step, int index);
  void run_mlp(const StepArrays& step, const Block& block);
  void finish_block(const StepArrays& step, int index);
  void take_hidden(const StepArrays& step, int index);
  void run_head(const StepArrays& step);
  void prepare(const Norm& norm, const Linear& linear, const float* row, int64_t index, int thread);
  void multiply(const Linear& linear, int64_t num_rows, float* y, int64_t stride);
  void multiply_last(const Block& block, const Linear& linear, const char* x, int64_t first,
                     int64_t rows);

  const Kernels& kernels_;
  std::shared_ptr<Pool> pool_;
  int hidden_size_, vocab_size_;
  KVType kv_type_;
  Embedding embedding_;
  Head head_;
  std::vector<Rope> ropes_;
  std::vector<LayerGroup> groups_;
  std::vector<Block> blocks_;
  std::vector<std::unique_ptr<KVCache>> caches_;
  std::atomic<bool> is_running_ = false;

  // Buffers of a step, kept for the next one.
  Buffer<float> hidden_;     // [rows, hidden]
  Buffer<float> core_;       // [rows, hidden]: what a block adds, unless it does so at once
  Buffer<float> work_;       // queries, keys, values and attention's result
  Buffer<float> stats_;      // [rows, num_heads, 2]
  Buffer<char> input_;       // prepared rows of a linear's input
  Buffer<char> down_input_;  // of an MLP's last linear, made while `input_` is read
  Buffer<float> scratch_;    // [threads, scratch_width_]
  size_t scratch_width_, input_width_ = 0, down_width_ = 0, max_heads_ = 0;
  Attend attend_;
  Experts experts_;
  // The rows that go on after the last keys and values are written, as a step of their own.
  StepArrays narrowed_;
  std::vector<int32_t> kept_rows_, kept_positions_, kept_logits_rows_;
  std::vector<std::vector<int32_t>> kept_hidden_rows_;
};

}  // namespace vivace
