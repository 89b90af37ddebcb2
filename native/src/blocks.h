// The block list of vivace/blocks.py, bound to buffers. They belong to whoever bound them.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "linear.h"
#include "ops.h"

namespace vivace {

// How rows are prepared for linears that read the same input: once for each kind of input.
struct PreparedRows {
  std::vector<InputFormat> kinds;
  std::vector<size_t> offsets;  // of each kind in a row
  // From one row to the next: a multiple of 64, and an odd one, so that the same column of many
  // rows does not fall into one cache set.
  size_t bytes = 0;

  // Where a kind lies; it is added if it is new.
  size_t place(const InputFormat& kind, int32_t K);
};

// A group of matrices that read the same input.
struct Linear {
  std::vector<LinearPart> parts;
  int32_t in_features = 0;
  PreparedRows input;  // set by share_input()

  int32_t out_features() const {
    int32_t rows = 0;
    for (const LinearPart& part : parts) rows += part.rows;
    return rows;
  }
  LinearJob job(const void* x, int64_t num_rows, float* y, int64_t stride) const {
    return {parts.data(), static_cast<int32_t>(parts.size()), in_features, x,
            input.bytes,  static_cast<int32_t>(num_rows),     y,           stride};
  }
};

// Lets linears read the same prepared rows.
void share_input(const std::vector<Linear*>& linears);

// Prepares inputs [first, last) of a row: float32 [last - first] -> input.bytes at `out`.
void prepare_row(const Kernels& kernels, const Linear& linear, int32_t first, int32_t last,
                 const float* row, char* out);
// All of them.
inline void prepare_row(const Kernels& kernels, const Linear& linear, const float* row, char* out) {
  prepare_row(kernels, linear, 0, linear.in_features, row, out);
}

struct Rope {
  const float* cos = nullptr;  // [num_positions, half]
  const float* sin = nullptr;
  int64_t num_positions = 0;
  int half = 0;
  bool is_interleaved = false;
};

struct LayerGroup {
  int num_layers, num_kv_heads, head_dim;
};

// down(act(gate) * up), or down(act(up)) where `gate_up` has one part.
struct Expert {
  Linear gate_up, down;
  bool is_gated() const { return gate_up.parts.size() == 2; }
};

// Called with a block's result [rows, hidden]; false ends the step.
using Site = std::function<bool(float* x, int64_t rows, int64_t hidden)>;

enum class BlockKind : int { attention, mlp, linear, experts };
enum class Routing : int { softmax, softmax_chosen, sparse_mixer };

struct Block {
  BlockKind kind = BlockKind::mlp;
  Norm norm, post_norm;
  float residual_scale = 1.0f;
  Site site;

  Linear in, out;  // attention: qkv and out; a linear: out; experts: in is the router

  int num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int rope = -1;  // -1: none
  int group = 0, cache_layer = 0;
  Norm q_norm, k_norm;  // of one head, or of all heads together
  float scale = 1.0f, soft_cap = 0.0f;
  const float* sinks = nullptr;

  std::vector<Expert> experts;  // an MLP has one; a shared one is the last
  Activation activation = Activation::silu;
  int num_active = 0;  // routed experts per row
  Routing routing = Routing::softmax;
  float jitter = 0.0f;
  bool has_shared = false;
  bool has_shared_gate = false;  // the router's last output

  int num_routed() const { return static_cast<int>(experts.size()) - has_shared; }
  // Whether a norm of queries or keys looks at all heads of a row.
  bool has_norm_of_heads() const {
    const auto is_wide = [&](const Norm& norm) {
      return norm.kind != NormKind::none && norm.size != head_dim;
    };
    return is_wide(q_norm) || is_wide(k_norm);
  }
  // Whether its last linear's outputs need nothing but to be added to the state.
  bool adds_at_once() const {
    return kind != BlockKind::experts && post_norm.kind == NormKind::none && !site &&
           last().parts.size() == 1;
  }
  const Linear& last() const { return kind == BlockKind::mlp ? experts[0].down : out; }
  // What the block's input is prepared for.
  const Linear& first() const {
    return kind == BlockKind::mlp ? experts[0].gate_up : kind == BlockKind::linear ? out : in;
  }
};

struct Embedding {
  Format format, positions_format;
  const void* weight = nullptr;     // [vocab, hidden]
  const void* positions = nullptr;  // [num_positions, hidden] or null
  int64_t num_positions = 0;
  float scale = 1.0f;
};

struct Head {
  Linear linear;
  Norm norm;
  float scale = 1.0f, soft_cap = 0.0f;
};

}  // namespace vivace
