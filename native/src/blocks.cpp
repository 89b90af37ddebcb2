#include "blocks.h"

namespace vivace {

size_t PreparedRows::place(const InputFormat& kind, int32_t K) {
  for (size_t i = 0; i < kinds.size(); ++i)
    if (kinds[i] == kind) return offsets[i];
  size_t end = 0;
  if (!kinds.empty()) end = offsets.back() + input_bytes(kinds.back(), K);
  kinds.push_back(kind);
  offsets.push_back(end);
  bytes = ((end + input_bytes(kind, K)) / 64 | 1) * 64;
  return end;
}

void share_input(const std::vector<Linear*>& linears) {
  PreparedRows shared;
  for (Linear* linear : linears)
    for (LinearPart& part : linear->parts)
      part.input_at = shared.place(part.format.input, linear->in_features);
  for (Linear* linear : linears) linear->input = shared;
}

void prepare_row(const Kernels& kernels, const Linear& linear, int32_t first, int32_t last,
                 const float* row, char* out) {
  for (size_t i = 0; i < linear.input.kinds.size(); ++i)
    prepare_input(kernels, linear.input.kinds[i], linear.in_features, first, last, row,
                  out + linear.input.offsets[i]);
}

}  // namespace vivace
