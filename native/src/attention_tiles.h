// Products of queries with a tile of 64 cached entries: scores, and sums of weighted values.
#pragma once

#include "attention.h"
#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

// Sums of a tile stay in registers only if inner loops are unrolled before arrays become scalars.

// Queries that share loads and vectors that share a query: their sums stay in registers.
constexpr int kQueryTile = VIVACE_LEVEL == 0 ? 4 : 6;
constexpr int kVectorTile = VIVACE_LEVEL >= 2 ? 4 : VIVACE_LEVEL == 1 ? 1 : 2;

// Where the four groups of 16 entries of a tile lie; null where no query reads a group.
struct Tile {
  const char* keys[4];
  const char* values[4];
};

Tile find_tile(const CacheView& cache, const Segment& segment, int kv_head, int64_t first,
               uint64_t bits) {
  const int64_t entry_bytes = cache.head_dim * (cache.type == KVType::float32 ? 4 : 2);
  int64_t block = first / cache.block_size, entry = first % cache.block_size;
  Tile tile = {};
  for (int group = 0; group < 4; ++group) {
    if ((bits >> (16 * group) & 0xffff) != 0) {
      const char* head =
          cache.base + segment.block_ids[block] * cache.block_bytes + kv_head * cache.head_bytes;
      tile.keys[group] = head + entry * entry_bytes;
      tile.values[group] = head + cache.value_bytes + entry * entry_bytes;
    }
    entry += 16;
    if (entry == cache.block_size) {
      entry = 0;
      ++block;
    }
  }
  return tile;
}

// What to ask for meanwhile: the tile that comes next, or this one again where it has no group.
Tile fill_gaps(Tile next, const Tile& tile) {
  for (int group = 0; group < 4; ++group) {
    if (next.keys[group]) continue;
    next.keys[group] = tile.keys[group];
    next.values[group] = tile.values[group];
  }
  return next;
}

// What all lanes of a vector of the cache are multiplied with, which is rounded as the cache is:
// one element of float32, two of bfloat16.
#if VIVACE_LEVEL >= 4
using PairFactor [[gnu::may_alias]] = uint32_t;  // lies where floats were
inline PairFactor pair_factor(float even, float odd) {
  return float_to_bf16(even) | static_cast<uint32_t>(float_to_bf16(odd)) << 16;
}
inline float even_of(PairFactor pair) {
  return bf16_to_float(static_cast<uint16_t>(pair));
}
#else
struct [[gnu::may_alias]] PairFactor {
  float even, odd;
};
inline PairFactor pair_factor(float even, float odd) {
  return {bf16_to_float(float_to_bf16(even)), bf16_to_float(float_to_bf16(odd))};
}
inline float even_of(PairFactor pair) {
  return pair.even;
}
#endif

// How a cache's vectors of 64 bytes are used: 16 lanes of one element, or of two side by side.
template <class T>
struct Cached;

template <>
struct Cached<float> {
  static constexpr int kElements = 1;
  using Vector = F32x16;
  using Factor = float;

  VIVACE_MEMBER static Vector load_vector(const char* p) {
    return load(reinterpret_cast<const float*>(p));
  }
  VIVACE_MEMBER static Vector keep(Vector x, unsigned) { return x; }
  VIVACE_MEMBER static F32x16 add_product(F32x16 sum, Vector x, Factor factor) {
    return fma(set1(factor), x, sum);
  }
};

template <>
struct Cached<uint16_t> {
  static constexpr int kElements = 2;
  using Vector = Pairs;
  using Factor = PairFactor;

  VIVACE_MEMBER static Vector load_vector(const char* p) {
    return load_pairs(reinterpret_cast<const uint16_t*>(p));
  }
  // The even elements (bit 0), the odd ones (bit 1), or both; zeros for others.
  VIVACE_MEMBER static Vector keep(Vector x, unsigned bits) {
    uint32_t lanes[16];
    __builtin_memcpy(lanes, &x, 64);
    for (uint32_t& lane : lanes) lane &= (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
    __builtin_memcpy(&x, lanes, 64);
    return x;
  }
  VIVACE_MEMBER static F32x16 add_product(F32x16 sum, Vector x, Factor factor) {
#if VIVACE_LEVEL >= 4
    return dot_bf16(sum, x, Pairs{_mm512_set1_epi32(static_cast<int>(factor))});
#else
    sum = fma(set1(factor.odd), odd_elements(x), sum);
    return fma(set1(factor.even), even_elements(x), sum);
#endif
  }
};

// Weights of a tile's entries, which take the place of its scores.
template <class T>
constexpr int kWeightStride =
    kTileEntries * 4 / static_cast<int>(sizeof(typename Cached<T>::Factor));

template <class T>
const typename Cached<T>::Factor* factors_of(const float* weights) {
  return reinterpret_cast<const typename Cached<T>::Factor*>(weights);
}

template <class T>
void make_factors(float* weights) {
  if constexpr (Cached<T>::kElements == 2) {
    uint16_t halves[kTileEntries];
    for (int i = 0; i < kTileEntries; i += 32)
      store_pairs(halves + i, to_pairs(load(weights + i), load(weights + i + 16)));
#if VIVACE_LEVEL >= 4
    __builtin_memcpy(weights, halves, sizeof(halves));
#else
    for (int i = 0; i < kTileEntries; i += 16) store(weights + i, load_bf16(halves + i));
#endif
  }
}

// Into the second-level cache: the first has no room for two tiles.
inline void prefetch(const char* line) {
  __builtin_prefetch(line, 0, 2);
}

// A tile that nothing came before.
void prefetch_tile(const Tile& tile, int64_t entry_bytes) {
  for (int group = 0; group < 4; ++group)
    for (int64_t byte = 0; tile.keys[group] && byte < 16 * entry_bytes; byte += 64) {
      prefetch(tile.keys[group] + byte);
      prefetch(tile.values[group] + byte);
    }
}

// Chains over the dimensions for R queries and C groups of 16 entries. The same place in `next` is
// asked for ahead of its use: hardware does not look past a page's end.
template <class T, int R, int C>
[[gnu::noinline]] void score_groups(const char* const* keys, const char* const* next,
                                    const typename Cached<T>::Factor* queries, int num_vectors,
                                    float* scores) {
  F32x16 sum[R][C];
  VIVACE_UNROLL
  for (int r = 0; r < R; ++r) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
  }
  for (int i = 0; i < num_vectors; ++i) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) prefetch(next[c] + 64 * i);
    typename Cached<T>::Vector key[C];
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) key[c] = Cached<T>::load_vector(keys[c] + 64 * i);
    VIVACE_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename Cached<T>::Factor query = queries[R * i + r];
      VIVACE_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = Cached<T>::add_product(sum[r][c], key[c], query);
    }
  }
  VIVACE_UNROLL
  for (int r = 0; r < R; ++r) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) store(scores + r * kTileEntries + 16 * c, sum[r][c]);
  }
}

// The last of an odd number of bfloat16 dimensions, which has no pair.
template <int R, int C>
[[gnu::noinline]] void score_last(const char* const* keys, const PairFactor* queries, int head_dim,
                                  float* scores) {
  const int d = head_dim - 1;
  for (int c = 0; c < C; ++c) {
    const F32x16 key = load_bf16(reinterpret_cast<const uint16_t*>(keys[c]) + 16 * d);
    for (int r = 0; r < R; ++r) {
      float* score = scores + r * kTileEntries + 16 * c;
      store(score, fma(set1(even_of(queries[R * (d / 2) + r])), key, load(score)));
    }
  }
}

template <class T, int R, int C>
void score_some(const char* const* keys, const char* const* next,
                const typename Cached<T>::Factor* queries, int head_dim, float* scores) {
  score_groups<T, R, C>(keys, next, queries, head_dim / Cached<T>::kElements, scores);
  if constexpr (Cached<T>::kElements == 2)
    if (head_dim % 2 != 0) score_last<R, C>(keys, queries, head_dim, scores);
}

template <class T, int R>
void score_tile(const Tile& tile, const Tile& next, const typename Cached<T>::Factor* queries,
                int head_dim, float* scores) {
  constexpr int C = kVectorTile;
  for (int group = 0; group < 4; group += C) {
    bool all = true;
    for (int c = 0; c < C; ++c) all &= tile.keys[group + c] != nullptr;
    if (all) {
      score_some<T, R, C>(tile.keys + group, next.keys + group, queries, head_dim,
                          scores + 16 * group);
      continue;
    }
    for (int c = group; c < group + C; ++c)
      if (tile.keys[c])
        score_some<T, R, 1>(tile.keys + c, next.keys + c, queries, head_dim, scores + 16 * c);
  }
}

// values[r] = values[r] * factors[r] + weights[r][entry] * value[entry], in the order of entries
// (of two side by side the odd one first), for R queries and C vectors of 16 dimensions. Entries
// that no query reads may hold anything.
template <class T, int R, int C>
[[gnu::noinline]] void add_values(const Tile& tile, const Tile& next, uint64_t bits,
                                  const typename Cached<T>::Factor* weights, const float* factors,
                                  int head_dim, int from, float* values, int64_t stride) {
  constexpr int kElements = Cached<T>::kElements;
  constexpr uint64_t kAll = (uint64_t{1} << kElements) - 1;
  F32x16 sum[R][C];
  VIVACE_UNROLL
  for (int r = 0; r < R; ++r) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c)
      sum[r][c] = mul(load(values + r * stride + from + 16 * c), set1(factors[r]));
  }
  while (bits != 0) {
    const int entry = __builtin_ctzll(bits) & -kElements, group = entry / 16;
    const auto seen = static_cast<unsigned>(bits >> entry & kAll);
    bits &= ~(kAll << entry);
    const int64_t place = (int64_t{entry % 16 / kElements} * head_dim + from) * 4;
    const char *value = tile.values[group] + place, *ahead = next.values[group] + place;
    typename Cached<T>::Vector loaded[C];
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) {
      prefetch(ahead + 64 * c);
      loaded[c] = Cached<T>::load_vector(value + 64 * c);
    }
    if (seen != kAll) [[unlikely]]
      for (auto& vector : loaded) vector = Cached<T>::keep(vector, seen);
    VIVACE_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto weight = weights[r * kWeightStride<T> + entry / kElements];
      VIVACE_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = Cached<T>::add_product(sum[r][c], loaded[c], weight);
    }
  }
  VIVACE_UNROLL
  for (int r = 0; r < R; ++r) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) store(values + r * stride + from + 16 * c, sum[r][c]);
  }
}

template <class T, int R>
void add_tile(const Tile& tile, const Tile& next, uint64_t bits,
              const typename Cached<T>::Factor* weights, const float* factors, int head_dim,
              float* values, int width) {
  constexpr int C = kVectorTile;
  int from = 0;
  for (; from + 16 * C <= width; from += 16 * C)
    add_values<T, R, C>(tile, next, bits, weights, factors, head_dim, from, values, width);
  if constexpr (C > 2)
    for (; from + 32 <= width; from += 32)
      add_values<T, R, 2>(tile, next, bits, weights, factors, head_dim, from, values, width);
  for (; from < width; from += 16)
    add_values<T, R, 1>(tile, next, bits, weights, factors, head_dim, from, values, width);
}

// f.operator()<R>(first) for groups of at most kQueryTile queries of nearly equal sizes R.
template <int R, class F>
void call_for_group(int size, int first, F& f) {
  if constexpr (R > 1)
    if (size < R) return call_for_group<R - 1>(size, first, f);
  f.template operator()<R>(first);
}

template <class F>
void for_query_groups(int count, F f) {
  int first = 0;
  for (int left = (count + kQueryTile - 1) / kQueryTile; left > 0; --left) {
    const int size = (count - first + left - 1) / left;
    call_for_group<kQueryTile>(size, first, f);
    first += size;
  }
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
