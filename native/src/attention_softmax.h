// The softmax of queries over tiles of scores, one after the other.
#pragma once

#include "attention.h"
#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

constexpr int kBlockQueries = 24;  // queries whose scores of a tile stay in the first-level cache

int smaller(int a, int b) {
  return a < b ? a : b;
}

// The softmax of one query so far: its values are sums of weights times values. The sum is 0 only
// if nothing was seen, and NaN if a score was; the maximum is never NaN.
struct Softmax {
  float maximum, sum;
};

// What a tile does to the softmax of each query.
struct Rescaling {
  alignas(64) float tile_maximum[kBlockQueries];
  alignas(64) float shift[kBlockQueries];   // the maximum, or 0 where nothing was seen
  alignas(64) float factor[kBlockQueries];  // for the sums so far: exactly 1 if it stands
};

float maximum_of_tile(const float* scores) {
  return reduce_max(
      max(max(load(scores), load(scores + 16)), max(load(scores + 32), load(scores + 48))));
}

// Brings the maxima of `count` queries up to those of a tile.
void raise_maxima(Rescaling& rescaling, float* maximum, int count) {
  for (int i = 0; i < count; i += 16) {
    const int lanes = smaller(count - i, 16);
    const F32x16 before = load_first(maximum + i, lanes);
    const F32x16 tile = load_first(rescaling.tile_maximum + i, lanes);
    const F32x16 after = select(less(before, tile), tile, before);  // before, where a tile is NaN
    const F32x16 shift = select(less(set1(-infinity()), after), after, zero());
    store_first(maximum + i, after, lanes);
    store_first(rescaling.shift + i, shift, lanes);
    store_first(rescaling.factor + i, exp_not_above_zero(sub(before, shift)), lanes);
  }
}

// A tile's scores become weights and are summed.
void weigh_tile(float* scores, float shift, float factor, float* sums) {
  const F32x16 top = set1(shift);
  F32x16 sum = mul(load(sums), set1(factor));
  for (int i = 0; i < kTileEntries; i += 16) {
    const F32x16 weight = exp_not_above_zero(sub(load(scores + i), top));
    store(scores + i, weight);
    sum = add(sum, weight);
  }
  store(sums, sum);
}

// Merge sums under another maximum into `into`; what saw nothing changes nothing.
void merge(Softmax& into, float* values, Softmax other, const float* other_values, int width) {
  if (other.sum == 0.0f) return;
  if (into.sum == 0.0f) {
    into = other;
    for (int d = 0; d < width; d += 16) store(values + d, load(other_values + d));
    return;
  }
  const float high = into.maximum > other.maximum ? into.maximum : other.maximum;
  const F32x16 keep = exp(set1(into.maximum - high));
  const F32x16 take = exp(set1(other.maximum - high));
  for (int d = 0; d < width; d += 16)
    store(values + d, fma(load(values + d), keep, mul(load(other_values + d), take)));
  into.sum = fma1(into.sum, exp1(into.maximum - high), other.sum * exp1(other.maximum - high));
  into.maximum = high;
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
