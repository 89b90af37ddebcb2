#include "check.h"

#include <string>

#include "native_error.h"

namespace vivace {

namespace {

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message;
  const auto append = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>)
      message += std::to_string(part);
    else
      message += part;
  };
  (append(parts), ...);
  throw NativeError(message);
}

void check_rows(const int32_t* rows, int64_t count, int64_t num_rows, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    require(rows[i] >= 0 && rows[i] < num_rows, what, " asks for row ", rows[i], " of ", num_rows);
}

void check_segment(const Segment& segment, const KVCache& cache) {
  require(
      segment.num_entries >= 0 && segment.num_entries <= segment.num_blocks * cache.block_size(),
      "a segment of ", segment.num_entries, " entries has ", segment.num_blocks, " blocks of ",
      cache.block_size());
  require(segment.mask >= MaskKind::causal && segment.mask <= MaskKind::cross, "unknown mask ",
          static_cast<int>(segment.mask));
  require(segment.mask != MaskKind::block_causal || segment.block_size > 0,
          "a block-causal mask needs a positive block_size");
  require(segment.mask != MaskKind::tree ||
              (segment.tree && segment.tree_entries <= segment.num_entries),
          "a tree mask needs a tree of at most ", segment.num_entries, " entries");
  for (int64_t i = 0; i < segment.num_blocks; ++i)
    require(segment.block_ids[i] < cache.num_blocks(), "cache block ", segment.block_ids[i],
            " is not one of ", cache.num_blocks());
}

// Blocks with a negative id are not held: no row may read them.
void check_held(const Segment& segment, const Span& span, const int32_t* positions,
                int block_size) {
  for (int64_t i = 0; i < segment.num_blocks; ++i) {
    if (segment.block_ids[i] >= 0) continue;
    const int64_t first = i * block_size;
    if (first >= segment.num_entries) continue;
    const int64_t last_position = first + block_size - 1 + segment.shift;
    bool is_unread = segment.mask == MaskKind::causal && segment.window > 0 &&
                     first + segment.shift >= segment.num_sinks;
    for (int64_t row = 0; is_unread && row < span.num_rows; ++row)
      is_unread = last_position <= positions[span.first_row + row] - segment.window;
    require(is_unread, "entry ", first, " of a segment may be read but its block is not held");
  }
}

void check_group(const StepArrays& step, const GroupStep& group, const KVCache& cache) {
  const int64_t num_slots = cache.num_blocks() * cache.block_size();
  for (int64_t i = 0; i < step.num_rows; ++i)
    require(group.slots[i] >= 0 && group.slots[i] < num_slots, "slot ", group.slots[i],
            " is not one of ", num_slots);
  int64_t row = 0;
  for (const Span& span : group.spans) {
    require(span.first_row == row && span.num_rows >= 0, "spans must cover the rows in order: row ",
            row, " is next, the span starts at ", span.first_row);
    row += span.num_rows;
    require(row <= step.num_rows, "spans cover more than ", step.num_rows, " rows");
    for (int64_t s = 0; s < span.num_segments; ++s) {
      check_segment(span.segments[s], cache);
      check_held(span.segments[s], span, step.positions, cache.block_size());
    }
  }
  require(row == step.num_rows, "spans cover ", row, " of ", step.num_rows, " rows");
}

void check_norm(const Norm& norm, int size, const char* name) {
  require(norm.kind == NormKind::none || norm.size == size, name, " has ", norm.size,
          " weights, expected ", size);
}

void check_outputs(const Linear& linear, int out_features, const std::string& name) {
  require(linear.out_features() == out_features, name, " gives ", linear.out_features(),
          " features, expected ", out_features);
}

// `owner`, such as "expert 3's ", is put before the names of its linears.
void check_expert(const Expert& expert, int hidden, const std::string& owner) {
  const std::vector<LinearPart>& parts = expert.gate_up.parts;
  check_linear(expert.gate_up, hidden, owner + "gate_up");
  require(parts.size() <= 2 && parts.front().rows == parts.back().rows, owner,
          "gate_up needs one part, or two of equal size");
  check_linear(expert.down, parts.front().rows, owner + "down");
  check_outputs(expert.down, hidden, owner + "down");
}

void check_experts(const Block& block, int hidden) {
  check_linear(block.in, hidden, "router");
  const int routed = block.num_routed();
  check_outputs(block.in, routed + block.has_shared_gate,
                block.has_shared_gate ? "router with shared_gate" : "router");
  require(block.num_active > 0 && block.num_active <= routed, "a row visits ", block.num_active,
          " experts of ", routed, ": expected 1 to all of them");
  require(block.has_shared || !block.has_shared_gate, "shared_gate needs a shared expert");
  require(block.jitter >= 0.0f, "jitter is ", block.jitter, ": expected 0 or more");
  for (int i = 0; i < routed; ++i) {
    const Expert &expert = block.experts[i], &first = block.experts.front();
    const std::string owner = "expert " + std::to_string(i) + "'s ";
    check_expert(expert, hidden, owner);
    require(
        expert.is_gated() == first.is_gated() && expert.down.in_features == first.down.in_features,
        owner, "shape is not the first expert's");
  }
  if (block.has_shared) check_expert(block.experts.back(), hidden, "the shared expert's ");
}

void check_attention(const Block& block, const ModelShape& shape) {
  check_linear(block.in, shape.hidden_size, "qkv");
  require(block.head_dim > 0 && block.head_dim <= kMaxHeadDim, "head_dim is ", block.head_dim,
          ": expected 1 to ", kMaxHeadDim);
  require(block.num_kv_heads > 0 && block.num_heads % block.num_kv_heads == 0, block.num_heads,
          " query heads do not divide among ", block.num_kv_heads, " key/value heads");
  const int q_size = block.num_heads * block.head_dim,
            kv_size = block.num_kv_heads * block.head_dim;
  check_linear(block.out, q_size, "out");
  check_outputs(block.out, shape.hidden_size, "out");
  check_outputs(block.in, q_size + 2 * kv_size, "qkv");
  require(block.group >= 0 && block.group < static_cast<int>(shape.groups.size()),
          "there is no layer group ", block.group);
  const LayerGroup& group = shape.groups[block.group];
  require(group.num_kv_heads == block.num_kv_heads && group.head_dim == block.head_dim &&
              block.cache_layer >= 0 && block.cache_layer < group.num_layers,
          "attention of layer ", block.cache_layer, " does not fit its layer group");
  require(block.rope < static_cast<int>(shape.ropes.size()), "there is no rope ", block.rope);
  require(block.rope < 0 || 2 * shape.ropes[block.rope].half <= block.head_dim,
          "the rotary size is larger than head_dim ", block.head_dim);
  if (block.q_norm.size != block.head_dim) check_norm(block.q_norm, q_size, "q_norm");
  if (block.k_norm.size != block.head_dim) check_norm(block.k_norm, kv_size, "k_norm");
}

}  // namespace

void check_linear(const Linear& linear, int in_features, const std::string& name) {
  require(linear.in_features == in_features, name, " reads ", linear.in_features,
          " features, expected ", in_features);
}

void check_block(const Block& block, const ModelShape& shape) {
  const int hidden = shape.hidden_size;
  check_norm(block.norm, hidden, "norm");
  check_norm(block.post_norm, hidden, "post_norm");
  switch (block.kind) {
    case BlockKind::attention:
      return check_attention(block, shape);
    case BlockKind::mlp:
      return check_expert(block.experts[0], hidden, "");
    case BlockKind::linear:
      check_linear(block.out, hidden, "linear");
      return check_outputs(block.out, hidden, "linear");
    case BlockKind::experts:
      return check_experts(block, hidden);
  }
}

void check_step(const StepArrays& step, const Embedding& embedding,
                const std::vector<Block>& blocks, const ModelShape& shape,
                const std::vector<std::unique_ptr<KVCache>>& caches) {
  const int num_blocks = static_cast<int>(blocks.size());
  require(
      0 <= step.first_block && step.first_block <= step.last_block && step.last_block <= num_blocks,
      "block range ", step.first_block, " to ", step.last_block, " of ", num_blocks);
  require(caches.size() == shape.groups.size(), "allocate the cache before the first step");
  require(step.groups.size() == shape.groups.size(), "the step has ", step.groups.size(),
          " layer groups, the model ", shape.groups.size());
  check_rows(step.given_rows, step.num_given, step.num_rows, "embeddings");
  check_rows(step.logits_rows, step.num_logits, step.num_rows, "logits_rows");
  require(step.num_logits == 0 || step.last_block == num_blocks,
          "logits need all blocks up to the last");
  for (const HiddenWant& want : step.hidden) {
    check_rows(want.rows, want.num_rows, step.num_rows, "hidden");
    const bool is_run = want.block >= step.first_block && want.block < step.last_block;
    require(is_run || (want.block == num_blocks && step.last_block == num_blocks),
            "hidden state after block ", want.block, ", which is not run");
  }
  std::vector<bool> is_given(step.num_rows, false);
  for (int64_t i = 0; i < step.num_given; ++i) is_given[step.given_rows[i]] = true;
  for (int64_t i = 0; i < step.num_rows; ++i) {
    require(is_given[i] || (step.tokens[i] >= 0 && step.tokens[i] < shape.vocab_size), "token ",
            step.tokens[i], " is not in the vocabulary of ", shape.vocab_size);
    const int64_t position = step.positions[i];
    require(position >= 0, "position ", position, " is negative");
    require(!embedding.positions || is_given[i] || position < embedding.num_positions, "position ",
            position, " is beyond the ", embedding.num_positions, " learned ones");
    for (const Rope& rope : shape.ropes)
      require(position < rope.num_positions, "position ", position, " is beyond the rope table of ",
              rope.num_positions);
  }
  for (size_t i = 0; i < step.groups.size(); ++i) check_group(step, step.groups[i], *caches[i]);
  int64_t num_sums = 0;
  for (int i = step.first_block; i < step.last_block; ++i)
    if (blocks[i].kind == BlockKind::attention)
      for (const Span& span : step.groups[blocks[i].group].spans)
        num_sums += blocks[i].num_heads * span.num_entries;
  require(step.num_top <= shape.vocab_size, step.num_top, " top logits of a vocabulary of ",
          shape.vocab_size);
  require(!step.attention_sums || step.num_sums == num_sums, "attention sums need ", num_sums,
          " values, not ", step.num_sums);
}

}  // namespace vivace
