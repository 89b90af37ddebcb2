// Which cached entries a row may read, 64 at a time. For kernel files: internal linkage.
#pragma once

#include "attention.h"

namespace vivace::VIVACE_ISA {
namespace {

// Entries of a segment that one row may read: [0, sink_end), [begin, end) and a row of the tree.
struct Visible {
  int64_t sink_end, begin, end, tree_begin;
  const uint8_t* tree;
};

int64_t clamp_index(int64_t value, int64_t high) {
  return value < 0 ? 0 : value > high ? high : value;
}

int64_t floor_divide(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && a < 0);
}

Visible visible_entries(const Segment& segment, int64_t position, int64_t row) {
  const int64_t n = segment.num_entries, shift = segment.shift;
  Visible seen = {0, 0, n, n, nullptr};
  switch (segment.mask) {
    case MaskKind::causal:
      seen.end = clamp_index(position + 1 - shift, n);
      if (segment.window > 0) {
        seen.begin = clamp_index(position - segment.window + 1 - shift, n);
        seen.sink_end = clamp_index(segment.num_sinks - shift, seen.end);
      }
      break;
    case MaskKind::block_causal: {
      const int64_t size = segment.block_size;
      seen.end = clamp_index((floor_divide(position, size) + 1) * size - shift, n);
      break;
    }
    case MaskKind::span: {
      const bool inside = position >= segment.span_start && position < segment.span_end;
      const int64_t last = inside ? segment.span_end : position + 1;
      seen.end = clamp_index(last - shift, n);
      break;
    }
    case MaskKind::tree:
      seen.end = seen.tree_begin = n - segment.tree_entries;
      seen.tree = segment.tree + row * segment.tree_entries;
      break;
    case MaskKind::full:
    case MaskKind::cross:
      break;
  }
  return seen;
}

uint64_t range_bits(int64_t begin, int64_t end, int64_t first) {
  begin = clamp_index(begin - first, kTileEntries);
  end = clamp_index(end - first, kTileEntries);
  if (begin >= end) return 0;
  return (~uint64_t{0} >> (kTileEntries - (end - begin))) << begin;
}

// Which of the 64 entries from `first` on a row may read.
uint64_t tile_bits(const Visible& seen, int64_t num_entries, int64_t first) {
  uint64_t bits = range_bits(0, seen.sink_end, first) | range_bits(seen.begin, seen.end, first);
  if (seen.tree) {
    const int64_t from = first > seen.tree_begin ? first : seen.tree_begin;
    const int64_t stop = first + kTileEntries < num_entries ? first + kTileEntries : num_entries;
    for (int64_t entry = from; entry < stop; ++entry)
      bits |= uint64_t{seen.tree[entry - seen.tree_begin] != 0} << (entry - first);
  }
  return bits;
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
