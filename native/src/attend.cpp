#include "attend.h"

#include <algorithm>

namespace vivace {

namespace {

// Work is cut so that no item is a larger share of it than one of so many for each thread.
constexpr int kItemsPerThread = 2;

int64_t num_chunks(const Span& span) {
  int64_t chunks = 0;
  for (int64_t s = 0; s < span.num_segments; ++s)
    chunks += (span.segments[s].num_entries + kChunkEntries - 1) / kChunkEntries;
  return chunks;
}

int shares_of(int count, int most) {
  return (count + most - 1) / most;
}

}  // namespace

void Attend::run(const Kernels& kernels, Pool& pool, const AttentionCall& call, float* sums) {
  const AttentionKernels& attention = *kernels.attention;
  make_items(call, pool.threads());
  split_items(call, pool.threads());
  pool.parallel(static_cast<int64_t>(parts_.size()), [&](int64_t index, int) {
    const auto [item, chunk] = parts_[index];
    if (chunk < 0)
      attention.attend(call, items_[item]);
    else
      attention.attend_part(call, items_[item], chunk);
  });
  if (!split_.empty())
    pool.parallel(static_cast<int64_t>(split_.size()),
                  [&](int64_t index, int) { attention.merge_parts(call, items_[split_[index]]); });
  if (!sums) return;
  std::vector<SumItem> sum_items;
  for (int64_t s = 0; s < call.num_spans; ++s) {
    for (int head = 0; head < call.num_kv_heads; ++head)
      sum_items.push_back({call.spans + s, sums, head});
    sums += call.num_heads * call.spans[s].num_entries;
  }
  pool.parallel(static_cast<int64_t>(sum_items.size()),
                [&](int64_t index, int) { attention.sum_weights(call, sum_items[index]); });
}

void Attend::make_items(const AttentionCall& call, int threads) {
  items_.clear();
  const int heads_per_kv = call.num_heads / call.num_kv_heads;
  const int heads = std::min(heads_per_kv, kMaxItemQueries);
  // Key/value heads lie side by side, so items of several read long runs, as far as that leaves
  // enough of them.
  int64_t chunks = 0;
  for (int64_t s = 0; s < call.num_spans; ++s) chunks += num_chunks(call.spans[s]);
  int most = call.num_kv_heads;
  while (most > 1 && chunks * shares_of(call.num_kv_heads, most) < kItemsPerThread * threads)
    most = shares_of(most, 2);
  for (int64_t s = 0; s < call.num_spans; ++s) {
    const Span& span = call.spans[s];
    if (span.num_rows == 0) continue;
    const int64_t fitting = kMaxItemQueries / (heads * span.num_rows);  // if all rows are in one
    const int kv_heads = static_cast<int>(std::clamp<int64_t>(fitting, 1, most));
    const int rows = kMaxItemQueries / (heads * kv_heads);
    // Late rows of a span read most: they come first, so that what is left in the end is small.
    for (int64_t row = (span.num_rows - 1) / rows * rows; row >= 0; row -= rows)
      for (int kv_head = 0; kv_head < call.num_kv_heads; kv_head += kv_heads)
        for (int head = 0; head < heads_per_kv; head += heads)
          items_.push_back({&span, row,
                            static_cast<int>(std::min<int64_t>(rows, span.num_rows - row)), kv_head,
                            std::min(kv_heads, call.num_kv_heads - kv_head), head,
                            std::min(heads, heads_per_kv - head), nullptr});
  }
}

void Attend::split_items(const AttentionCall& call, int threads) {
  parts_.clear();
  split_.clear();
  size_t num_floats = 0;
  int64_t total = 0;
  for (const AttentionItem& item : items_) total += num_chunks(*item.span) * item.num_queries();
  for (size_t i = 0; i < items_.size(); ++i) {
    const int64_t chunks = num_chunks(*items_[i].span), work = chunks * items_[i].num_queries();
    if (chunks < 2 || work * kItemsPerThread * threads <= total) {
      parts_.emplace_back(i, -1);
      continue;
    }
    split_.push_back(static_cast<int32_t>(i));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) parts_.emplace_back(i, chunk);
    num_floats += chunks * items_[i].num_queries() * (call.head_dim + 2);
  }
  if (partial_.size() < num_floats) partial_.resize(num_floats);
  float* partial = partial_.data();
  for (int32_t i : split_) {
    AttentionItem& item = items_[i];
    item.partial = partial;
    partial += num_chunks(*item.span) * item.num_queries() * (call.head_dim + 2);
  }
}

}  // namespace vivace
