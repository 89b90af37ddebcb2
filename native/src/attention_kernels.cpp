// Attention on one instruction set.
#include "attention.h"
#include "functions.h"
#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

constexpr int kQueryTile = 4;                           // queries that share loads
constexpr int kVectorTile = VIVACE_LEVEL >= 2 ? 4 : 2;  // vectors that share a query

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

// Where the four groups of 16 entries of a tile lie; null where no query reads a group.
struct Tile {
  const char* keys[4];
  const char* values[4];
};

Tile find_tile(const CacheView& cache, const Segment& segment, int kv_head, int64_t first,
               uint64_t bits) {
  const int64_t element = cache.type == KVType::float32 ? 4 : 2;
  Tile tile = {};
  for (int group = 0; group < 4; ++group) {
    if ((bits >> (16 * group) & 0xffff) == 0) continue;
    const int64_t entry = first + 16 * group;
    const int64_t block = segment.block_ids[entry / cache.block_size];
    const char* head = cache.base + block * cache.block_bytes + kv_head * cache.head_bytes;
    const int64_t offset = entry % cache.block_size * cache.head_dim * element;
    tile.keys[group] = head + offset;
    tile.values[group] = head + cache.value_bytes + offset;
  }
  return tile;
}

inline F32x16 load_elements(const float* from) {
  return load(from);
}
inline F32x16 load_elements(const uint16_t* from) {
  return load_bf16(from);
}

// Chains over the dimensions for R queries and C groups of 16 entries.
template <class T, int R, int C>
void score_groups(const char* const* keys, const float* queries, int64_t stride, int head_dim,
                  float* scores) {
  F32x16 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
  for (int d = 0; d < head_dim; ++d) {
    F32x16 key[C];
    for (int c = 0; c < C; ++c)
      key[c] = load_elements(reinterpret_cast<const T*>(keys[c]) + 16 * d);
    for (int r = 0; r < R; ++r) {
      const F32x16 query = set1(queries[r * stride + d]);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(query, key[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(scores + r * kTileEntries + 16 * c, sum[r][c]);
}

template <class T, int R>
void score_tile(const Tile& tile, const float* queries, int64_t stride, int head_dim,
                float* scores) {
  constexpr int C = kVectorTile;
  for (int group = 0; group < 4; group += C) {
    bool all = true;
    for (int c = 0; c < C; ++c) all &= tile.keys[group + c] != nullptr;
    if (all) {
      score_groups<T, R, C>(tile.keys + group, queries, stride, head_dim, scores + 16 * group);
      continue;
    }
    for (int c = 0; c < C; ++c)
      if (tile.keys[group + c])
        score_groups<T, R, 1>(tile.keys + group + c, queries, stride, head_dim,
                              scores + 16 * (group + c));
  }
}

// Scores of a tile as the softmax sees them: capped, weighted, and -inf where not visible.
void finish_scores(const AttentionCall& call, const Segment& segment, int64_t first, uint64_t bits,
                   float* scores) {
  if (call.soft_cap > 0.0f) {
    const F32x16 cap = set1(call.soft_cap), inverse = set1(1.0f / call.soft_cap);
    for (int i = 0; i < kTileEntries; i += 16)
      store(scores + i, mul(cap, tanh(mul(load(scores + i), inverse))));
  }
  if (segment.log_weights)
    for (int i = 0; i < kTileEntries; ++i)
      if (bits >> i & 1) scores[i] = scores[i] + segment.log_weights[first + i];
  for (uint64_t hidden = ~bits; hidden != 0; hidden &= hidden - 1)
    scores[__builtin_ctzll(hidden)] = -infinity();
}

// The softmax of one query so far: its values are sums of weights times values. The sum is 0 only
// if nothing was seen, and NaN if a score was; the maximum is never NaN.
struct Softmax {
  float maximum, sum;
};

// Take a tile's scores in: they become weights, the sums so far are brought to the new maximum.
void weigh_tile(float* scores, float& maximum, float* sums, float* values, int width) {
  F32x16 high =
      max(max(load(scores), load(scores + 16)), max(load(scores + 32), load(scores + 48)));
  const float tile_maximum = reduce_max(high);
  if (tile_maximum > maximum) {
    if (maximum != -infinity()) {
      const F32x16 factor = exp(set1(maximum - tile_maximum));
      store(sums, mul(load(sums), factor));
      for (int d = 0; d < width; d += 16) store(values + d, mul(load(values + d), factor));
    }
    maximum = tile_maximum;
  }
  const F32x16 shift = set1(maximum == -infinity() ? 0.0f : maximum);
  F32x16 sum = load(sums);
  for (int i = 0; i < kTileEntries; i += 16) {
    const F32x16 weight = exp(sub(load(scores + i), shift));
    store(scores + i, weight);
    sum = add(sum, weight);
  }
  store(sums, sum);
}

// values[r] += weights[r][entry] * value[entry], entry by entry, for R queries and C vectors.
template <class T, int R, int C>
void add_values(const Tile& tile, uint64_t bits, const float* weights, int head_dim, int from,
                float* values, int64_t stride) {
  F32x16 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = load(values + r * stride + from + 16 * c);
  for (; bits != 0; bits &= bits - 1) {
    const int entry = __builtin_ctzll(bits);
    const T* value =
        reinterpret_cast<const T*>(tile.values[entry / 16]) + int64_t{entry % 16} * head_dim + from;
    F32x16 loaded[C];
    for (int c = 0; c < C; ++c) loaded[c] = load_elements(value + 16 * c);
    for (int r = 0; r < R; ++r) {
      const F32x16 weight = set1(weights[r * kTileEntries + entry]);
      for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, loaded[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(values + r * stride + from + 16 * c, sum[r][c]);
}

// What an item's queries have gathered. Lanes past head_dim hold anything and are never used.
struct Gathered {
  alignas(64) float values[kMaxItemQueries * kMaxHeadDim];
  alignas(64) float sums[kMaxItemQueries * 16];
  float maximum[kMaxItemQueries];
};

struct Queries {
  alignas(64) float vectors[kMaxItemQueries * kMaxHeadDim];  // scaled
  int64_t position[kMaxItemQueries];
  int count, width;  // width: head_dim rounded up to whole vectors
};

void load_queries(const AttentionCall& call, const AttentionItem& item, Queries& queries) {
  queries.width = (call.head_dim + 15) / 16 * 16;
  queries.count = item.num_rows * item.num_heads;
  const int heads_per_kv = call.num_heads / call.num_kv_heads;
  for (int i = 0; i < queries.count; ++i) {
    const int64_t row = item.span->first_row + item.first_row + i / item.num_heads;
    const int head = item.kv_head * heads_per_kv + item.first_head + i % item.num_heads;
    const float* from = call.queries + row * call.q_stride + int64_t{head} * call.head_dim;
    float* to = queries.vectors + i * queries.width;
    for (int d = 0; d < call.head_dim; ++d) to[d] = from[d] * call.scale;
  }
}

// R queries against one tile.
template <class T, int R>
void attend_queries(const AttentionCall& call, const Segment& segment, const Tile& tile,
                    int64_t first, const uint64_t* bits, const Queries& queries, int query,
                    Gathered& gathered) {
  alignas(64) float scores[R * kTileEntries];
  const int width = queries.width;
  score_tile<T, R>(tile, queries.vectors + query * width, width, call.head_dim, scores);
  uint64_t any = 0;
  for (int r = 0; r < R; ++r) {
    any |= bits[r];
    if (bits[r] == 0) {
      for (int i = 0; i < kTileEntries; ++i) scores[r * kTileEntries + i] = 0.0f;
      continue;
    }
    finish_scores(call, segment, first, bits[r], scores + r * kTileEntries);
    weigh_tile(scores + r * kTileEntries, gathered.maximum[query + r],
               gathered.sums + 16 * (query + r), gathered.values + (query + r) * width, width);
  }
  constexpr int C = kVectorTile;
  float* values = gathered.values + query * width;
  int from = 0;
  for (; from + 16 * C <= width; from += 16 * C)
    add_values<T, R, C>(tile, any, scores, call.head_dim, from, values, width);
  for (; from < width; from += 16)
    add_values<T, R, 1>(tile, any, scores, call.head_dim, from, values, width);
}

template <class T>
void attend_tile(const AttentionCall& call, const Segment& segment, int kv_head, int64_t first,
                 const uint64_t* bits, const Queries& queries, Gathered& gathered) {
  constexpr int kGroup = kQueryTile;
  for (int query = 0; query < queries.count; query += kGroup) {
    const int left = queries.count - query, group = left < kGroup ? left : kGroup;
    uint64_t any = 0;
    for (int r = 0; r < group; ++r) any |= bits[query + r];
    if (any == 0) continue;
    const Tile tile = find_tile(call.cache, segment, kv_head, first, any);
    const uint64_t* own = bits + query;
    switch (group) {
      case 1:
        attend_queries<T, 1>(call, segment, tile, first, own, queries, query, gathered);
        break;
      case 2:
        attend_queries<T, 2>(call, segment, tile, first, own, queries, query, gathered);
        break;
      case 3:
        attend_queries<T, 3>(call, segment, tile, first, own, queries, query, gathered);
        break;
      default:
        attend_queries<T, 4>(call, segment, tile, first, own, queries, query, gathered);
    }
  }
}

// Ask for the entries of a tile ahead of their use: hardware does not look past a page's end.
void prefetch_tile(const AttentionCall& call, const Segment& segment, int kv_head, int64_t first,
                   uint64_t bits) {
  const Tile tile = find_tile(call.cache, segment, kv_head, first, bits);
  const int64_t bytes = 16 * call.head_dim * (call.cache.type == KVType::float32 ? 4 : 2);
  for (int group = 0; group < 4; ++group) {
    if (!tile.keys[group]) continue;
    for (int64_t byte = 0; byte < bytes; byte += 64) {
      __builtin_prefetch(tile.keys[group] + byte);
      __builtin_prefetch(tile.values[group] + byte);
    }
  }
}

// One chunk of a segment, from nothing.
void attend_chunk(const AttentionCall& call, const AttentionItem& item, const Segment& segment,
                  int64_t chunk, const Queries& queries, Gathered& gathered) {
  for (int i = 0; i < queries.count; ++i) {
    gathered.maximum[i] = -infinity();
    store(gathered.sums + 16 * i, zero());
    for (int d = 0; d < queries.width; d += 16)
      store(gathered.values + i * queries.width + d, zero());
  }
  Visible seen[kMaxItemQueries];
  for (int row = 0; row < item.num_rows; ++row) {
    const int64_t in_span = item.first_row + row;
    seen[row] = visible_entries(segment, call.positions[item.span->first_row + in_span], in_span);
  }
  const int64_t first = chunk * kChunkEntries;
  int64_t last = first + kChunkEntries;
  if (last > segment.num_entries) last = segment.num_entries;
  for (int64_t tile = first; tile < last; tile += kTileEntries) {
    uint64_t bits[kMaxItemQueries], any = 0;
    for (int row = 0; row < item.num_rows; ++row) {
      const uint64_t own = tile_bits(seen[row], segment.num_entries, tile);
      any |= own;
      for (int h = 0; h < item.num_heads; ++h) bits[row * item.num_heads + h] = own;
    }
    if (any == 0) continue;
    if (tile + kTileEntries < segment.num_entries)
      prefetch_tile(call, segment, item.kv_head, tile + kTileEntries,
                    tile_bits(seen[item.num_rows - 1], segment.num_entries, tile + kTileEntries));
    if (call.cache.type == KVType::float32)
      attend_tile<float>(call, segment, item.kv_head, tile, bits, queries, gathered);
    else
      attend_tile<uint16_t>(call, segment, item.kv_head, tile, bits, queries, gathered);
  }
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

// Add the head's sink, divide by the sum, write out. Adding zero turns -0, which an entry that is
// masked for this query but not for its neighbours could have flipped, into +0.
void finish_query(const AttentionCall& call, const AttentionItem& item, int query, Softmax softmax,
                  float* values, int width) {
  const int64_t row = item.span->first_row + item.first_row + query / item.num_heads;
  const int head = item.kv_head * (call.num_heads / call.num_kv_heads) + item.first_head +
                   query % item.num_heads;
  if (call.sinks) {
    alignas(64) float nothing[kMaxHeadDim];
    for (int d = 0; d < width; d += 16) store(nothing + d, zero());
    merge(softmax, values, {call.sinks[head], 1.0f}, nothing, width);
  }
  float* out = call.out + row * call.out_stride + int64_t{head} * call.head_dim;
  const F32x16 inverse = set1(softmax.sum == 0.0f ? 0.0f : 1.0f / softmax.sum);
  alignas(64) float whole[kMaxHeadDim];
  for (int d = 0; d < width; d += 16) store(whole + d, fma(load(values + d), inverse, zero()));
  for (int d = 0; d < call.head_dim; ++d) out[d] = whole[d];
  float* stats = call.stats + (row * call.num_heads + head) * 2;
  stats[0] = softmax.maximum;
  stats[1] = softmax.sum;
}

int64_t num_chunks(const Segment& segment) {
  return (segment.num_entries + kChunkEntries - 1) / kChunkEntries;
}

void attend_item(const AttentionCall& call, const AttentionItem& item) {
  Queries queries;
  Gathered part;
  alignas(64) float values[kMaxItemQueries * kMaxHeadDim];
  Softmax softmax[kMaxItemQueries];
  load_queries(call, item, queries);
  const int width = queries.width;
  for (int i = 0; i < queries.count; ++i) {
    softmax[i] = {-infinity(), 0.0f};
    for (int d = 0; d < width; d += 16) store(values + i * width + d, zero());
  }
  for (int64_t s = 0; s < item.span->num_segments; ++s) {
    const Segment& segment = item.span->segments[s];
    for (int64_t chunk = 0; chunk < num_chunks(segment); ++chunk) {
      attend_chunk(call, item, segment, chunk, queries, part);
      for (int i = 0; i < queries.count; ++i)
        merge(softmax[i], values + i * width,
              {part.maximum[i], reduce_add(load(part.sums + 16 * i))}, part.values + i * width,
              width);
    }
  }
  for (int i = 0; i < queries.count; ++i)
    finish_query(call, item, i, softmax[i], values + i * width, width);
}

void attend_part(const AttentionCall& call, const AttentionItem& item, int64_t index) {
  Queries queries;
  Gathered part;
  load_queries(call, item, queries);
  const Segment* segment = item.span->segments;
  int64_t chunk = index;
  for (; chunk >= num_chunks(*segment); ++segment) chunk -= num_chunks(*segment);
  attend_chunk(call, item, *segment, chunk, queries, part);
  const int64_t stride = call.head_dim + 2;
  for (int i = 0; i < queries.count; ++i) {
    float* to = item.partial + (index * queries.count + i) * stride;
    to[0] = part.maximum[i];
    to[1] = reduce_add(load(part.sums + 16 * i));
    for (int d = 0; d < call.head_dim; ++d) to[2 + d] = part.values[i * queries.width + d];
  }
}

void merge_parts(const AttentionCall& call, const AttentionItem& item) {
  const int count = item.num_rows * item.num_heads, width = (call.head_dim + 15) / 16 * 16;
  int64_t num_parts = 0;
  for (int64_t s = 0; s < item.span->num_segments; ++s)
    num_parts += num_chunks(item.span->segments[s]);
  alignas(64) float values[kMaxHeadDim], other[kMaxHeadDim];
  for (int i = 0; i < count; ++i) {
    Softmax softmax = {-infinity(), 0.0f};
    for (int d = 0; d < width; ++d) values[d] = other[d] = 0.0f;
    for (int64_t index = 0; index < num_parts; ++index) {
      const float* from = item.partial + (index * count + i) * (call.head_dim + 2);
      for (int d = 0; d < call.head_dim; ++d) other[d] = from[2 + d];
      merge(softmax, values, {from[0], from[1]}, other, width);
    }
    finish_query(call, item, i, softmax, values, width);
  }
}

// A second pass over the same scores, with the final maxima and sums, rows in order.
void sum_weights(const AttentionCall& call, const SumItem& sum) {
  const int heads_per_kv = call.num_heads / call.num_kv_heads;
  Queries queries;
  alignas(64) float scores[kTileEntries];
  for (int64_t row = 0; row < sum.span->num_rows; ++row)
    for (int h = 0; h < heads_per_kv; ++h) {
      const AttentionItem item = {sum.span, row, 1, sum.kv_head, h, 1, nullptr};
      load_queries(call, item, queries);
      const int64_t step_row = sum.span->first_row + row;
      const int head = sum.kv_head * heads_per_kv + h;
      const float* stats = call.stats + (step_row * call.num_heads + head) * 2;
      if (stats[1] == 0.0f) continue;
      const F32x16 maximum = set1(stats[0]), inverse = set1(1.0f / stats[1]);
      float* to = sum.sums + head * sum.span->num_entries;
      for (int64_t s = 0; s < sum.span->num_segments; ++s) {
        const Segment& segment = sum.span->segments[s];
        const Visible seen = visible_entries(segment, call.positions[step_row], row);
        for (int64_t first = 0; first < segment.num_entries; first += kTileEntries) {
          const uint64_t bits = tile_bits(seen, segment.num_entries, first);
          if (bits == 0) continue;
          const Tile tile = find_tile(call.cache, segment, sum.kv_head, first, bits);
          if (call.cache.type == KVType::float32)
            score_tile<float, 1>(tile, queries.vectors, queries.width, call.head_dim, scores);
          else
            score_tile<uint16_t, 1>(tile, queries.vectors, queries.width, call.head_dim, scores);
          finish_scores(call, segment, first, bits, scores);
          for (int i = 0; i < kTileEntries; i += 16)
            store(scores + i, mul(exp(sub(load(scores + i), maximum)), inverse));
          for (uint64_t left = bits; left != 0; left &= left - 1)
            to[first + __builtin_ctzll(left)] += scores[__builtin_ctzll(left)];
        }
        to += segment.num_entries;
      }
    }
}

// Whether all elements are finite as they are stored; bfloat16 rounds up to infinity earlier.
bool is_storable(const CacheView& cache, const float* x) {
  const int32_t limit = cache.type == KVType::float32 ? 0x7f800000 : 0x7f7f8000;
  int32_t highest = 0;
  for (int d = 0; d < cache.head_dim; ++d) {
    const int32_t size = static_cast<int32_t>(bits_of(x[d]) & 0x7fffffffu);
    highest = size > highest ? size : highest;
  }
  return highest < limit;
}

bool write_entry(const CacheView& cache, int64_t slot, int kv_head, const float* key,
                 const float* value) {
  char* head =
      cache.base + slot / cache.block_size * cache.block_bytes + kv_head * cache.head_bytes;
  const int64_t entry = slot % cache.block_size;
  const int64_t tile = entry / 16 * 16 * cache.head_dim + entry % 16;
  if (cache.type == KVType::float32) {
    float* keys = reinterpret_cast<float*>(head) + tile;
    float* values = reinterpret_cast<float*>(head + cache.value_bytes) + entry * cache.head_dim;
    for (int d = 0; d < cache.head_dim; ++d) {
      keys[16 * d] = key[d];
      values[d] = value[d];
    }
  } else {
    uint16_t* keys = reinterpret_cast<uint16_t*>(head) + tile;
    uint16_t* values =
        reinterpret_cast<uint16_t*>(head + cache.value_bytes) + entry * cache.head_dim;
    for (int d = 0; d < cache.head_dim; ++d) {
      keys[16 * d] = float_to_bf16(key[d]);
      values[d] = float_to_bf16(value[d]);
    }
  }
  return is_storable(cache, key) && is_storable(cache, value);
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {attend_item, attend_part, merge_parts, sum_weights,
                                            write_entry};

}  // namespace vivace::VIVACE_ISA
