// Routed MLPs: rows are gathered by the expert that they visit, multiplied together, and each row
// adds up what its experts gave in order of rank. So a row's result does not know who came along.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.h"
#include "buffer.h"
#include "isa.h"
#include "pool.h"

namespace vivace {

struct ExpertsCall {
  const Kernels& kernels;
  Pool& pool;
  const Block& block;
  const char* input;  // prepared rows
  int64_t num_rows;
  float* out;  // [rows, hidden]
};

class Experts {
 public:
  // False, with `out` half done, if a router's outputs are NaN or infinite.
  bool run(ExpertsCall call);

 private:
  void reserve(const ExpertsCall& call);
  bool route(const ExpertsCall& call);
  void sort(const ExpertsCall& call);
  void gather(const ExpertsCall& call);
  void multiply(const ExpertsCall& call, Linear Expert::* linear);
  void activate(const ExpertsCall& call);
  void combine(const ExpertsCall& call);
  char* input_of(int32_t expert, int64_t place, size_t row_bytes) const;

  // A row's visits are [num_active] routed ones in order of rank, then the shared one. A visit's
  // place is its number when all are sorted by expert, then by row.
  int64_t num_visits_ = 0;            // of one row
  Buffer<int32_t> experts_, places_;  // [rows, visits]
  Buffer<float> weights_;             // [rows, visits]
  std::vector<int32_t> starts_;       // first place of each expert
  Buffer<float> logits_;              // [rows, router outputs]
  Buffer<float> scratch_;             // per thread, of a row's routing
  size_t input_width_ = 0;            // bytes of a place in `inputs_`
  Buffer<char> inputs_;               // prepared rows, by place
  int64_t value_width_ = 0;
  Buffer<float> values_;  // [places, value_width_]: gates, then what the experts give
  std::vector<LinearJob> jobs_;
};

}  // namespace vivace
