// Blocks of one layer group's keys and values.
//
// A block holds `block_size` entries of every layer of the group: [layer][kv_head] of
// keys [block_size/16 tiles][head_dim][16 entries], then values [block_size][head_dim]. Keys lie
// dimension-major in tiles so that scores are chains over the dimensions with entries in lanes. Of
// bfloat16 the two elements that a chain takes together lie side by side: keys
// [head_dim/2][16 entries][2], the last dimension of an odd number alone, and values
// [block_size/2][head_dim][2].
#pragma once

#include <cstddef>
#include <cstdint>

namespace vivace {

enum class KVType { float32, bfloat16 };

// How attention finds one layer's entries; plain data for the kernels.
struct CacheView {
  char* base;           // of the layer in block 0
  int64_t block_bytes;  // from a block to the next
  int64_t head_bytes;   // from a head's keys to the next head's keys
  int64_t value_bytes;  // from a head's keys to its values
  int block_size;
  int head_dim;
  KVType type;
};

class KVCache {
 public:
  // Maps zero pages that the system fills in when they are first written.
  KVCache(KVType type, int num_layers, int num_kv_heads, int head_dim, int64_t num_blocks,
          int block_size);
  ~KVCache();
  KVCache(const KVCache&) = delete;
  KVCache& operator=(const KVCache&) = delete;

  static int64_t bytes_per_block(KVType type, int num_layers, int num_kv_heads, int head_dim,
                                 int block_size);
  int64_t bytes_per_block() const { return block_bytes_; }
  int64_t num_blocks() const { return num_blocks_; }
  int num_layers() const { return num_layers_; }
  int num_kv_heads() const { return num_kv_heads_; }
  int head_dim() const { return head_dim_; }
  int block_size() const { return block_size_; }

  CacheView layer(int index) const;
  void copy(int64_t source, int64_t target);
  void read(int64_t block, void* bytes) const;
  void write(int64_t block, const void* bytes);
  void fill(int byte);

 private:
  char* block(int64_t index) const;

  KVType type_;
  int num_layers_, num_kv_heads_, head_dim_, block_size_;
  int64_t num_blocks_, block_bytes_, mapped_bytes_;
  char* base_;
};

}  // namespace vivace
