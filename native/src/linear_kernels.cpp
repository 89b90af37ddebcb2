// Linear layers on row-major floats, read where the file is mapped: a tile's weights stay in the
// first-level cache while rows of x stream past from the second.
#include "linear.h"
#include "tiles.h"

namespace vivace::VIVACE_ISA {
namespace {

// ---------------------------------------------------------------- many tiles

template <class F, int NR>
void multiply_tiles(int K, const typename F::Weight* w, const float* bias, int rows, const char* x,
                    size_t x_stride, int M, float* y, int64_t ldy, const void* next) {
  constexpr int kRowsMost = NR == kWideOutputs ? kWideRows : kRows;
  const int tiles = (M + kRowsMost - 1) / kRowsMost;
  const int steps_per_line = 64 / (F::kStep * static_cast<int>(sizeof(typename F::Weight)));
  for (int n = 0; n < rows; n += NR) {
    const auto* at = w + static_cast<size_t>(n) * K;
    const void* following = n + 2 * NR <= rows ? at + static_cast<size_t>(NR) * K : next;
    Ahead ahead{static_cast<const char*>(following), K * sizeof(typename F::Weight),
                2 * tiles * steps_per_line, following != nullptr ? 1 : INT32_MAX};
    for (int m = 0, tile = 0; tile < tiles; ++tile) {
      const int count = (M - m) / (tiles - tile);  // even shares
      multiply_rows<F, NR>(count, K, at, static_cast<size_t>(K), x + m * x_stride, x_stride,
                           bias == nullptr ? nullptr : bias + n, y + m * ldy + n, ldy, ahead);
      m += count;
    }
  }
}

template <class F>
void multiply_as(const LinearItem& item) {
  const auto* w = static_cast<const typename F::Weight*>(item.weight);
  const char* x = static_cast<const char*>(item.x);
  const int K = item.K, M = item.M, rows = item.rows;
  const int width = M <= kWideRows ? kWideOutputs : kOutputs, whole = rows / width * width;
  if (M <= kWideRows)
    multiply_tiles<F, kWideOutputs>(K, w, item.bias, whole, x, item.x_stride, M, item.y, item.ldy,
                                    item.next);
  else
    multiply_tiles<F, kOutputs>(K, w, item.bias, whole, x, item.x_stride, M, item.y, item.ldy,
                                item.next);
  if (whole < rows)
    multiply_tiles<F, 1>(K, w + static_cast<size_t>(whole) * K,
                         item.bias == nullptr ? nullptr : item.bias + whole, rows - whole, x,
                         item.x_stride, M, item.y + whole, item.ldy, nullptr);
}

void multiply(const Format& format, const LinearItem& item) {
  switch (format.storage) {
    case Storage::float32:
      return multiply_as<Float32>(item);
    case Storage::bfloat16:
      return format.input.type == InputType::bfloat16 ? multiply_as<Bfloat16>(item)
                                                      : multiply_as<WideBfloat16>(item);
    default:
      return multiply_as<WideFloat16>(item);
  }
}

F32x16 round_to_f16(F32x16 x) {
  uint16_t half[16];
  store_f16(half, x);
  return load_f16(half);
}

void prepare(InputType type, int32_t first, int32_t last, const float* row, void* out) {
  int32_t k = first;
  const auto left = [&] { return last - k; };
  const auto x = [&] { return row + (k - first); };
  if (type == InputType::bfloat16) {
    auto* to = static_cast<uint16_t*>(out);
    for (; left() >= 16; k += 16) store_bf16(to + k, load(x()));
    if (left() > 0) store_bf16(to + k, load_first(x(), left())), k += 16;
    if (k % 32 != 0) store_bf16(to + k, zero());
    return;
  }
  auto* to = static_cast<float*>(out);
  const bool rounds = type == InputType::float16;
  for (; left() > 0; k += 16) {
    const F32x16 value = left() < 16 ? load_first(x(), left()) : load(x());
    store(to + k, rounds ? round_to_f16(value) : value);
  }
}

// ---------------------------------------------------------------- what the machine can do at most

double peak(bool bf16, int64_t rounds) {
  constexpr int kChains = VIVACE_LEVEL >= 2 ? 24 : 6;
  F32x16 acc[kChains];
  uint16_t raw[32];
  for (uint16_t& value : raw) value = 0x3c00;
  Pairs a = load_pairs(raw), b = a;
  F32x16 x = set1(0.5f);
  VIVACE_UNROLL
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i));
  if (bf16) {
    for (int64_t round = 0; round < rounds; ++round) {
      VIVACE_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = dot_bf16(acc[i], a, b);
    }
  } else {
    for (int64_t round = 0; round < rounds; ++round) {
      VIVACE_UNROLL
      for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], x, x);
    }
  }
  float total = 0;
  VIVACE_UNROLL
  for (int i = 0; i < kChains; ++i) total += reduce_add(acc[i]);
  __asm__ volatile("" : : "m"(total));
  return static_cast<double>(rounds) * kChains * (bf16 ? 64 : 32);
}

// Variant: number of streams (1, 2, 4, 8) with and without software prefetch of 1 KiB.
uint64_t read_memory(int variant, const void* data, size_t bytes) {
  const int streams = 1 << variant % 4;
  const size_t ahead = variant >= 4 ? 1024 : 0;
  const size_t part = bytes / static_cast<size_t>(streams) / 64 * 64;
  const char* p = static_cast<const char*>(data);
  F32x16 most[4] = {zero(), zero(), zero(), zero()};
  for (size_t offset = 0; offset + 256 <= part; offset += 256) {
    for (int s = 0; s < streams; ++s) {
      const char* at = p + static_cast<size_t>(s) * part + offset;
      VIVACE_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (ahead != 0) __builtin_prefetch(at + ahead + i * 64, 0, 3);
        most[i] = max(load(reinterpret_cast<const float*>(at + i * 64)), most[i]);
      }
    }
  }
  return bits_of(reduce_max(max(max(most[0], most[1]), max(most[2], most[3]))));
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {prepare, multiply, peak, read_memory, 8};

}  // namespace vivace::VIVACE_ISA
