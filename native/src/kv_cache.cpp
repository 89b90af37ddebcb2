#include "kv_cache.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

#include "native_error.h"

namespace vivace {

namespace {
constexpr int64_t kOverread = 64;  // kernels load whole vectors at the last value's end

int64_t element_bytes(KVType type) {
  return type == KVType::float32 ? 4 : 2;
}
}  // namespace

int64_t KVCache::bytes_per_block(KVType type, int num_layers, int num_kv_heads, int head_dim,
                                 int block_size) {
  return int64_t{2} * num_layers * num_kv_heads * head_dim * block_size * element_bytes(type);
}

KVCache::KVCache(KVType type, int num_layers, int num_kv_heads, int head_dim, int64_t num_blocks,
                 int block_size)
    : type_(type),
      num_layers_(num_layers),
      num_kv_heads_(num_kv_heads),
      head_dim_(head_dim),
      block_size_(block_size),
      num_blocks_(num_blocks),
      block_bytes_(bytes_per_block(type, num_layers, num_kv_heads, head_dim, block_size)) {
  if (block_size <= 0 || block_size % 16 != 0)
    throw NativeError("block_size is " + std::to_string(block_size) +
                      ": expected a multiple of 16");
  if (num_blocks < 0 || num_blocks > (int64_t{1} << 46) / block_bytes_)
    throw NativeError(std::to_string(num_blocks) + " cache blocks do not fit in memory");
  mapped_bytes_ = num_blocks * block_bytes_ + kOverread;
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    throw NativeError("the cache of " + std::to_string(mapped_bytes_) +
                      " bytes cannot be mapped: lower the number of blocks");
  base_ = static_cast<char*>(memory);
  // A head's entries of one block are about a page: with small ones nearly every read would first
  // have to look up an address. Only a hint: it may fail.
  madvise(memory, mapped_bytes_, MADV_HUGEPAGE);
}

KVCache::~KVCache() {
  munmap(base_, mapped_bytes_);
}

CacheView KVCache::layer(int index) const {
  const int64_t values = int64_t{block_size_} * head_dim_ * element_bytes(type_);
  return {base_ + index * num_kv_heads_ * 2 * values,
          block_bytes_,
          2 * values,
          values,
          block_size_,
          head_dim_,
          type_};
}

char* KVCache::block(int64_t index) const {
  if (index < 0 || index >= num_blocks_)
    throw NativeError("cache block " + std::to_string(index) + " is not one of " +
                      std::to_string(num_blocks_));
  return base_ + index * block_bytes_;
}

void KVCache::copy(int64_t source, int64_t target) {
  const char* from = block(source);
  char* to = block(target);
  if (from != to) std::memcpy(to, from, block_bytes_);
}

void KVCache::read(int64_t index, void* bytes) const {
  std::memcpy(bytes, block(index), block_bytes_);
}

void KVCache::write(int64_t index, const void* bytes) {
  std::memcpy(block(index), bytes, block_bytes_);
}

void KVCache::fill(int byte) {
  std::memset(base_, byte, mapped_bytes_);
}

}  // namespace vivace
