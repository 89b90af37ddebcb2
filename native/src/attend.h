// Cuts a step's attention into fixed work items and runs them.
#pragma once

#include <utility>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "pool.h"

namespace vivace {

class Attend {
 public:
  // `sums`: for every span in turn [num_heads, num_entries] zeros, or null.
  void run(const Kernels& kernels, Pool& pool, const AttentionCall& call, float* sums);

 private:
  void make_items(const AttentionCall& call, int threads);
  void split_items(const AttentionCall& call, int threads);

  std::vector<AttentionItem> items_;
  std::vector<std::pair<int32_t, int32_t>> parts_;  // (item, chunk), or (item, -1) for all of it
  std::vector<int32_t> split_;                      // items whose parts must be merged
  std::vector<float> partial_;
};

}  // namespace vivace
