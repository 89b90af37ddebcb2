// Refuses what does not fit a program, before anything is read or written.
#pragma once

#include <string>

#include "program.h"

namespace vivace {

struct ModelShape {
  int hidden_size, vocab_size;
  const std::vector<Rope>& ropes;
  const std::vector<LayerGroup>& groups;
};

// Each throws NativeError with a sentence that says what was wrong.
void check_linear(const Linear& linear, int in_features, const std::string& name);
void check_block(const Block& block, const ModelShape& shape);
void check_step(const StepArrays& step, const Embedding& embedding,
                const std::vector<Block>& blocks, const ModelShape& shape,
                const std::vector<std::unique_ptr<KVCache>>& caches);

}  // namespace vivace
