// Attention on one instruction set.
#include "attention.h"
#include "attention_softmax.h"
#include "attention_tiles.h"
#include "functions.h"
#include "visible.h"

namespace vivace::VIVACE_ISA {
namespace {

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
  if (bits == 0)
    for (int i = 0; i < kTileEntries; i += 16) store(scores + i, set1(-infinity()));
  else
    for (uint64_t hidden = ~bits; hidden != 0; hidden &= hidden - 1)
      scores[__builtin_ctzll(hidden)] = -infinity();
}

// What an item's queries have gathered. Lanes past head_dim hold anything and are never used.
struct Gathered {
  alignas(64) float values[kMaxItemQueries * kMaxHeadDim];
  alignas(64) float sums[kMaxItemQueries * 16];
  float maximum[kMaxItemQueries];
};

// Groups of queries, R together, lie dimension-major [head_dim][R], or [head_dim/2][R] pairs for a
// cache of bfloat16, so that one address finds them.
struct Queries {
  alignas(64) float vectors[kMaxItemQueries * kMaxHeadDim];  // scaled
  int count, width;  // width: head_dim rounded up to whole vectors

  template <class T>
  const typename Cached<T>::Factor* of(int first) const {
    return reinterpret_cast<const typename Cached<T>::Factor*>(vectors + first * width);
  }
};

// Which row of the step and which head an item's query is.
struct Place {
  int64_t row;
  int head;

  Place(const AttentionCall& call, const AttentionItem& item, int query)
      : row(item.span->first_row + item.first_row + query % item.group_size() / item.num_heads),
        head((item.first_kv_head + query / item.group_size()) *
                 (call.num_heads / call.num_kv_heads) +
             item.first_head + query % item.num_heads) {}
};

// Queries [begin, begin + count) of an item, at most kBlockQueries of one key/value head.
struct QueryBlock {
  int begin, count;
};

template <class F>
void for_blocks(const AttentionItem& item, F f) {
  const int size = item.group_size();
  for (int group = 0; group < item.num_queries(); group += size)
    for (int in = 0; in < size; in += kBlockQueries)
      f(QueryBlock{group + in, smaller(kBlockQueries, size - in)});
}

void load_queries(const AttentionCall& call, const AttentionItem& item, Queries& queries) {
  queries.width = (call.head_dim + 15) / 16 * 16;
  queries.count = item.num_queries();
  for_blocks(item, [&](const QueryBlock& block) {
    for_query_groups(block.count, [&]<int R>(int in_block) {
      const int first = block.begin + in_block;
      for (int r = 0; r < R; ++r) {
        const Place place(call, item, first + r);
        const float* from =
            call.queries + place.row * call.q_stride + int64_t{place.head} * call.head_dim;
        float* to = queries.vectors + first * queries.width;
        if (call.cache.type == KVType::float32) {
          for (int d = 0; d < call.head_dim; ++d) to[R * d + r] = from[d] * call.scale;
          continue;
        }
        auto* pairs = reinterpret_cast<PairFactor*>(to) + r;
        for (int d = 0; d < call.head_dim; d += 2)
          pairs[R * (d / 2)] = pair_factor(from[d] * call.scale,
                                           d + 1 < call.head_dim ? from[d + 1] * call.scale : 0.0f);
      }
    });
  });
}

// What a block of queries reads of one tile.
struct Reads {
  Tile tile;
  uint64_t bits[kBlockQueries], any;
  int64_t first;
};

// An item's queries against one chunk of a segment, blocks of queries one tile at a time.
struct Chunk {
  const AttentionCall& call;
  const AttentionItem& item;
  const Segment& segment;
  const Queries& queries;
  Gathered& gathered;
  Visible seen[kMaxItemQueries];  // by row
  QueryBlock blocks[kMaxItemQueries];
  int num_blocks;

  void find(const QueryBlock& block, int64_t first, int64_t last, Reads& reads) const {
    reads.any = 0;
    reads.first = first;
    for (int query = 0; query < block.count && first < last; ++query) {
      const int in_group = (block.begin + query) % item.group_size();
      const bool is_known = query > 0 && in_group % item.num_heads != 0;
      reads.bits[query] =
          is_known ? reads.bits[query - 1]
                   : tile_bits(seen[in_group / item.num_heads], segment.num_entries, first);
      reads.any |= reads.bits[query];
    }
    const int kv_head = item.first_kv_head + block.begin / item.group_size();
    reads.tile = find_tile(call.cache, segment, kv_head, first, reads.any);
  }

  template <class T>
  void score(const QueryBlock& block, const Reads& reads, const Tile& next, float* scores) const {
    const Tile ahead = fill_gaps(next, reads.tile);
    for_query_groups(block.count, [&]<int R>(int query) {
      score_tile<T, R>(reads.tile, query == 0 ? ahead : reads.tile,
                       queries.of<T>(block.begin + query), call.head_dim,
                       scores + query * kTileEntries);
    });
  }

  template <class T>
  void weigh(const QueryBlock& block, const Reads& reads, float* scores,
             Rescaling& rescaling) const {
    for (int query = 0; query < block.count; ++query) {
      float* own = scores + query * kTileEntries;
      finish_scores(call, segment, reads.first, reads.bits[query], own);
      rescaling.tile_maximum[query] = maximum_of_tile(own);
    }
    raise_maxima(rescaling, gathered.maximum + block.begin, block.count);
    for (int query = 0; query < block.count; ++query) {
      float* own = scores + query * kTileEntries;
      weigh_tile(own, rescaling.shift[query], rescaling.factor[query],
                 gathered.sums + 16 * (block.begin + query));
      make_factors<T>(own);
    }
  }

  template <class T>
  void add(const QueryBlock& block, const Reads& reads, const Tile& next, const float* weights,
           const Rescaling& rescaling) const {
    const Tile ahead = fill_gaps(next, reads.tile);
    for_query_groups(block.count, [&]<int R>(int query) {
      uint64_t any = 0;
      for (int r = 0; r < R; ++r) any |= reads.bits[query + r];
      add_tile<T, R>(reads.tile, query == 0 ? ahead : reads.tile, any,
                     factors_of<T>(weights + query * kTileEntries), rescaling.factor + query,
                     call.head_dim, gathered.values + (block.begin + query) * queries.width,
                     queries.width);
    });
  }

  // All blocks tile by tile: in the order in which memory has what they read.
  template <class T>
  void run(int64_t first, int64_t last) const {
    alignas(64) float scores[kBlockQueries * kTileEntries];
    Reads reads[2];
    Rescaling rescaling;
    int now = 0;
    find(blocks[0], first, last, reads[now]);
    prefetch_tile(reads[now].tile, call.head_dim * sizeof(T));
    for (int64_t entry = first; entry < last; entry += kTileEntries)
      for (int i = 0; i < num_blocks; ++i, now = 1 - now) {
        const bool is_last = i + 1 == num_blocks;
        Reads& after = reads[1 - now];
        find(blocks[is_last ? 0 : i + 1], is_last ? entry + kTileEntries : entry, last, after);
        if (reads[now].any == 0) continue;
        score<T>(blocks[i], reads[now], after.tile, scores);
        weigh<T>(blocks[i], reads[now], scores, rescaling);
        add<T>(blocks[i], reads[now], after.tile, scores, rescaling);
      }
  }
};

// One chunk of a segment, from nothing.
void attend_chunk(const AttentionCall& call, const AttentionItem& item, const Segment& segment,
                  int64_t index, const Queries& queries, Gathered& gathered) {
  for (int i = 0; i < queries.count; ++i) {
    gathered.maximum[i] = -infinity();
    store(gathered.sums + 16 * i, zero());
    for (int d = 0; d < queries.width; d += 16)
      store(gathered.values + i * queries.width + d, zero());
  }
  Chunk chunk = {call, item, segment, queries, gathered, {}, {}, 0};
  for (int row = 0; row < item.num_rows; ++row) {
    const int64_t in_span = item.first_row + row;
    chunk.seen[row] =
        visible_entries(segment, call.positions[item.span->first_row + in_span], in_span);
  }
  for_blocks(item, [&](const QueryBlock& block) { chunk.blocks[chunk.num_blocks++] = block; });
  const int64_t first = index * kChunkEntries;
  int64_t last = first + kChunkEntries;
  if (last > segment.num_entries) last = segment.num_entries;
  if (call.cache.type == KVType::float32)
    chunk.run<float>(first, last);
  else
    chunk.run<uint16_t>(first, last);
}

// Add the head's sink, divide by the sum, write out. Adding zero turns -0, which an entry that is
// masked for this query but not for its neighbours could have flipped, into +0.
void finish_query(const AttentionCall& call, const AttentionItem& item, int query, Softmax softmax,
                  float* values, int width) {
  const auto [row, head] = Place(call, item, query);
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
  const int count = item.num_queries(), width = (call.head_dim + 15) / 16 * 16;
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
      const AttentionItem item = {sum.span, row, 1, sum.kv_head, 1, h, 1, nullptr};
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
            score_tile<float, 1>(tile, tile, queries.of<float>(0), call.head_dim, scores);
          else
            score_tile<uint16_t, 1>(tile, tile, queries.of<uint16_t>(0), call.head_dim, scores);
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

char* head_of(const CacheView& cache, int64_t slot, int kv_head) {
  return cache.base + slot / cache.block_size * cache.block_bytes + kv_head * cache.head_bytes;
}

bool write_key(const CacheView& cache, int64_t slot, int kv_head, const float* key) {
  char* head = head_of(cache, slot, kv_head);
  const int64_t entry = slot % cache.block_size, size = cache.head_dim;
  const int64_t tile = entry / 16 * 16 * size, lane = entry % 16;
  if (cache.type == KVType::float32) {
    float* keys = reinterpret_cast<float*>(head) + tile + lane;
    for (int64_t d = 0; d < size; ++d) keys[16 * d] = key[d];
  } else {
    uint16_t* keys = reinterpret_cast<uint16_t*>(head) + tile;
    for (int64_t d = 0; d < size; ++d) {
      const bool is_paired = (d ^ 1) < size;  // the last of an odd number is not
      keys[is_paired ? d / 2 * 32 + 2 * lane + d % 2 : 16 * d + lane] = float_to_bf16(key[d]);
    }
  }
  return is_storable(cache, key);
}

bool write_value(const CacheView& cache, int64_t slot, int kv_head, const float* value) {
  char* head = head_of(cache, slot, kv_head) + cache.value_bytes;
  const int64_t entry = slot % cache.block_size, size = cache.head_dim;
  for (int64_t d = 0; d < size; ++d) {
    if (cache.type == KVType::float32)
      reinterpret_cast<float*>(head)[entry * size + d] = value[d];
    else
      reinterpret_cast<uint16_t*>(head)[(entry / 2 * size + d) * 2 + entry % 2] =
          float_to_bf16(value[d]);
  }
  return is_storable(cache, value);
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {attend_item, attend_part, merge_parts,
                                            sum_weights, write_key,   write_value};

}  // namespace vivace::VIVACE_ISA
