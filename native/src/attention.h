// Attention over segments of cached entries, with results that depend on nothing but what is read.
//
// A query row walks its entries in logical order: tiles of 64, the online softmax rescaled only at
// their borders; chunks of 1,024 are merged by log-sum-exp in order, then segments in list order,
// then the head's sink. All borders are borders of the entry index, so a row's bits are the same
// whatever the step, the block size, the work items and the threads.
#pragma once

#include <cstdint>

#include "kv_cache.h"

namespace vivace {

enum class MaskKind : int { causal, full, block_causal, span, tree, cross };

constexpr int kTileEntries = 64;
constexpr int kChunkEntries = 1024;
constexpr int kMaxHeadDim = 512;
constexpr int kMaxItemQueries = 48;  // query vectors (rows x heads) of a work item

// A run of cached entries and who may read them: `vivace.types.Segment`, flat.
struct Segment {
  const int32_t* block_ids;
  int64_t num_blocks, num_entries, shift;
  MaskKind mask;
  int64_t window, num_sinks, block_size, span_start, span_end;
  const uint8_t* tree;  // [rows of the span, tree_entries] or null
  int64_t tree_entries;
  const float* log_weights;  // [num_entries] or null
};

// Consecutive rows that read the same segments.
struct Span {
  int64_t first_row, num_rows;
  const Segment* segments;
  int64_t num_segments, num_entries;  // entries of all segments
};

struct AttentionCall {
  CacheView cache;
  const float* queries;  // [rows, num_heads * head_dim], at q_stride
  int64_t q_stride;
  float* out;  // [rows, num_heads * head_dim], at out_stride
  int64_t out_stride;
  float* stats;  // [rows, num_heads, 2]: the maximum and the sum of weights under it
  const int32_t* positions;
  const Span* spans;
  int64_t num_spans;
  int num_heads, num_kv_heads, head_dim;
  float scale;
  float soft_cap;      // 0: none
  const float* sinks;  // [num_heads] or null
};

// Some query heads of each of some key/value heads, for some rows of a span. Its queries are
// counted [key/value heads][rows][heads].
struct AttentionItem {
  const Span* span;
  int64_t first_row;  // inside the span
  int num_rows, first_kv_head, num_kv_heads, first_head, num_heads;
  float* partial;  // [parts, queries, head_dim + 2] if split into chunks, else null

  int group_size() const { return num_rows * num_heads; }  // queries of a key/value head
  int num_queries() const { return num_kv_heads * group_size(); }
};

// A span and a key/value head whose weights are summed over the span's rows.
struct SumItem {
  const Span* span;
  float* sums;  // [num_heads, span entries]
  int kv_head;
};

// ---- one table per instruction set, defined in attention_kernels.cpp

struct AttentionKernels {
  void (*attend)(const AttentionCall& call, const AttentionItem& item);
  // One chunk of a split item, counted over all its segments.
  void (*attend_part)(const AttentionCall& call, const AttentionItem& item, int64_t index);
  void (*merge_parts)(const AttentionCall& call, const AttentionItem& item);
  void (*sum_weights)(const AttentionCall& call, const SumItem& item);
  // One row's key or value of one head. False if an element is not finite as it is stored:
  // attention needs finite values, for what a row may not read has the weight 0, and 0 * inf is
  // NaN.
  bool (*write_key)(const CacheView& cache, int64_t slot, int kv_head, const float* key);
  bool (*write_value)(const CacheView& cache, int64_t slot, int kv_head, const float* value);
};

}  // namespace vivace
