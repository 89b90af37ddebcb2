// Drawing tokens from logits. A row's token depends on its logits, options and random key alone.
#pragma once

#include <cstdint>

#include "isa.h"
#include "pool.h"

namespace vivace {

// Options of a row, in this order: see vivace.types.SamplingParams.
struct SamplingOptions {
  double repetition_penalty, presence_penalty, frequency_penalty;
  double temperature, typical_p, top_p, min_p, top_k;  // top_k 0: off
};

struct RandomKey {
  uint64_t seed, stream, position, purpose;
};

// Lists per row: those of row r are [offsets[r], offsets[r + 1]). Null offsets: no row has any.
struct TokenLists {
  const int64_t* offsets = nullptr;
  const int32_t* ids = nullptr;
};

struct SampleArrays {
  int64_t num_rows = 0, vocab_size = 0;
  const float* logits = nullptr;  // [rows, vocab]
  const SamplingOptions* options = nullptr;
  const RandomKey* keys = nullptr;
  TokenLists history;                       // tokens so far, the prompt's first
  const int64_t* num_prompt_ids = nullptr;  // per row, of its history
  TokenLists bias;
  const float* bias_values = nullptr;
  TokenLists forbidden;
  int32_t* tokens = nullptr;   // [rows], out
  float* logprobs = nullptr;   // [rows], of the tokens under the raw logits; null: not wanted
  int64_t num_top = 0;         // alternatives per row
  int32_t* top_ids = nullptr;  // [rows, num_top]
  float* top_logprobs = nullptr;
};

// Throws NativeError if logits are NaN or no token is possible.
void sample(const Kernels& kernels, Pool& pool, const SampleArrays& arrays);

// Log-probabilities of `targets` [rows] and of the largest ones, under the raw logits.
void log_probs(const Kernels& kernels, Pool& pool, const SampleArrays& arrays,
               const int32_t* targets);

// The `count` largest values, ties to the lower id.
void largest(const float* x, int64_t size, int64_t count, int32_t* ids, float* values);

// Equal to vivace.types.RandomKey.uniform.
double uniform(const RandomKey& key);

}  // namespace vivace
