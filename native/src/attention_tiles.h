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

// Keys of 16 entries of dimension d + step: float32 has one dimension a vector, bfloat16 two.
inline F32x16 load_keys(const float* keys, int d, int) {
  return load(keys + 16 * d);
}

inline F32x16 load_keys(const uint16_t* keys, int d, int step) {
  const Pairs pairs = load_pairs(keys + 16 * d);
  return step == 0 ? even_elements(pairs) : odd_elements(pairs);
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
                                    const float* queries, int head_dim, float* scores) {
  constexpr int kStep = 4 / sizeof(T);  // dimensions of a vector's 64 bytes
  F32x16 sum[R][C];
  VIVACE_UNROLL
  for (int r = 0; r < R; ++r) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
  }
  for (int d = 0; d + kStep <= head_dim; d += kStep) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) prefetch(next[c] + 16 * sizeof(T) * d);
    VIVACE_UNROLL
    for (int step = 0; step < kStep; ++step) {
      F32x16 key[C];
      VIVACE_UNROLL
      for (int c = 0; c < C; ++c) key[c] = load_keys(reinterpret_cast<const T*>(keys[c]), d, step);
      VIVACE_UNROLL
      for (int r = 0; r < R; ++r) {
        const F32x16 query = set1(queries[R * (d + step) + r]);
        VIVACE_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] = fma(query, key[c], sum[r][c]);
      }
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
[[gnu::noinline]] void score_last(const char* const* keys, const float* queries, int head_dim,
                                  float* scores) {
  const int d = head_dim - 1;
  for (int c = 0; c < C; ++c) {
    const F32x16 key = load_bf16(reinterpret_cast<const uint16_t*>(keys[c]) + 16 * d);
    for (int r = 0; r < R; ++r) {
      float* score = scores + r * kTileEntries + 16 * c;
      store(score, fma(set1(queries[R * d + r]), key, load(score)));
    }
  }
}

template <class T, int R>
void score_tile(const Tile& tile, const Tile& next, const float* queries, int head_dim,
                float* scores) {
  constexpr int C = kVectorTile;
  const bool is_odd = sizeof(T) == 2 && head_dim % 2 != 0;
  for (int group = 0; group < 4; group += C) {
    bool all = true;
    for (int c = 0; c < C; ++c) all &= tile.keys[group + c] != nullptr;
    if (all) {
      score_groups<T, R, C>(tile.keys + group, next.keys + group, queries, head_dim,
                            scores + 16 * group);
      if (is_odd) score_last<R, C>(tile.keys + group, queries, head_dim, scores + 16 * group);
      continue;
    }
    for (int c = group; c < group + C; ++c)
      if (tile.keys[c]) {
        score_groups<T, R, 1>(tile.keys + c, next.keys + c, queries, head_dim, scores + 16 * c);
        if (is_odd) score_last<R, 1>(tile.keys + c, queries, head_dim, scores + 16 * c);
      }
  }
}

// C vectors of a value. Two of bfloat16 are the even and the odd of 32 dimensions: see `unpair`.
template <int C>
void load_value(const float* from, F32x16* to) {
  for (int c = 0; c < C; ++c) to[c] = load(from + 16 * c);
}

template <int C>
void load_value(const uint16_t* from, F32x16* to) {
  if constexpr (C == 1) {
    to[0] = load_bf16(from);
  } else {
    for (int c = 0; c < C; c += 2) {
      const Pairs pairs = load_pairs(from + 16 * c);
      to[c] = even_elements(pairs);
      to[c + 1] = odd_elements(pairs);
    }
  }
}

// values[r] = values[r] * factors[r] + weights[r][entry] * value[entry], entry by entry, for R
// queries and C vectors.
template <class T, int R, int C>
[[gnu::noinline]] void add_values(const Tile& tile, const Tile& next, uint64_t bits,
                                  const float* weights, const float* factors, int head_dim,
                                  int from, float* values, int64_t stride) {
  F32x16 sum[R][C];
  VIVACE_UNROLL
  for (int r = 0; r < R; ++r) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c)
      sum[r][c] = mul(load(values + r * stride + from + 16 * c), set1(factors[r]));
  }
  for (; bits != 0; bits &= bits - 1) {
    const int entry = __builtin_ctzll(bits);
    const int64_t place = (int64_t{entry % 16} * head_dim + from) * sizeof(T);
    const char* value = tile.values[entry / 16] + place;
    for (size_t byte = 0; byte < 16 * C * sizeof(T); byte += 64)
      prefetch(next.values[entry / 16] + place + byte);
    F32x16 loaded[C];
    load_value<C>(reinterpret_cast<const T*>(value), loaded);
    VIVACE_UNROLL
    for (int r = 0; r < R; ++r) {
      const F32x16 weight = set1(weights[r * kTileEntries + entry]);
      VIVACE_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, loaded[c], sum[r][c]);
    }
  }
  VIVACE_UNROLL
  for (int r = 0; r < R; ++r) {
    VIVACE_UNROLL
    for (int c = 0; c < C; ++c) store(values + r * stride + from + 16 * c, sum[r][c]);
  }
}

template <class T, int R>
void add_tile(const Tile& tile, const Tile& next, uint64_t bits, const float* weights,
              const float* factors, int head_dim, float* values, int width) {
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

// Brings what `load_value` took apart back into the order of dimensions.
void unpair(float* values, int width) {
  if (kVectorTile == 1) return;
  for (int d = 0; d + 32 <= width; d += 32) {
    float apart[32];
    __builtin_memcpy(apart, values + d, sizeof(apart));
    for (int i = 0; i < 16; ++i) {
      values[d + 2 * i] = apart[i];
      values[d + 2 * i + 1] = apart[16 + i];
    }
  }
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
