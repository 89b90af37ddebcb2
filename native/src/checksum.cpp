// Sums of files: multiply and rotate eight words side by side, piece by piece.
#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "pack.h"
#include "pool.h"

namespace vivace {

namespace {

constexpr size_t kPieceBytes = 1 << 20;  // part of the definition of a sum
constexpr int kLanes = 8;

// One-to-one in `sum` for each `word`, and in `word` for each `sum`.
uint64_t mix(uint64_t sum, uint64_t word) {
  return std::rotl(sum ^ word, 29) * 0x9e3779b97f4a7c15u;
}

uint64_t sum_of_piece(const uint8_t* data, size_t bytes) {
  uint64_t sums[kLanes], words[kLanes];
  for (int i = 0; i < kLanes; ++i) sums[i] = static_cast<uint64_t>(i);
  for (; bytes >= sizeof(words); bytes -= sizeof(words), data += sizeof(words)) {
    std::memcpy(words, data, sizeof(words));
    for (int i = 0; i < kLanes; ++i) sums[i] = mix(sums[i], words[i]);
  }
  std::memset(words, 0, sizeof(words));
  std::memcpy(words, data, bytes);
  uint64_t total = bytes;
  for (int i = 0; i < kLanes; ++i) total = mix(mix(total, sums[i]), words[i]);
  return total;
}

}  // namespace

uint64_t checksum(Pool& pool, const uint8_t* data, size_t bytes) {
  std::vector<uint64_t> pieces((bytes + kPieceBytes - 1) / kPieceBytes);
  pool.parallel(static_cast<int64_t>(pieces.size()), [&](int64_t item, int) {
    const size_t first = static_cast<size_t>(item) * kPieceBytes;
    pieces[static_cast<size_t>(item)] =
        sum_of_piece(data + first, std::min(kPieceBytes, bytes - first));
  });
  uint64_t total = bytes;
  for (const uint64_t piece : pieces) total = mix(total, piece);
  return total;
}

}  // namespace vivace
