// Linear layers on row-major weights: tiles of dot products, one vector of partial sums per output.
//
// Output (m, n) is one accumulator of 16 lanes that walks K in order, then reduce_add's tree. Tiles
// only group outputs; they never change what an output sums. Weights are read where the file is
// mapped: a tile's stay in the first-level cache while rows of x stream past from the second.
#include "linear.h"
#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

// ---------------------------------------------------------------- formats

// A format says how one step along K is loaded and accumulated.
struct Float32 {
  using Weight = float;
  using Input = float;
  using Value = F32x16;
  static constexpr int kStep = 16;
  VIVACE_INLINE Value weight(const Weight* p) { return load(p); }
  VIVACE_INLINE Value weight_first(const Weight* p, int n) { return load_first(p, n); }
  VIVACE_INLINE Value input(const Input* p) { return load(p); }
  VIVACE_INLINE F32x16 accumulate(F32x16 acc, Value x, Value w) { return fma(x, w, acc); }
};

struct WideBfloat16 : Float32 {
  using Weight = uint16_t;
  VIVACE_INLINE Value weight(const Weight* p) { return load_bf16(p); }
  VIVACE_INLINE Value weight_first(const Weight* p, int n) { return load_bf16_first(p, n); }
};

struct WideFloat16 : Float32 {
  using Weight = uint16_t;
  VIVACE_INLINE Value weight(const Weight* p) { return load_f16(p); }
  VIVACE_INLINE Value weight_first(const Weight* p, int n) { return load_f16_first(p, n); }
};

struct Bfloat16 {
  using Weight = uint16_t;
  using Input = uint16_t;
  using Value = Pairs;
  static constexpr int kStep = 32;
  VIVACE_INLINE Value weight(const Weight* p) { return load_pairs(p); }
  VIVACE_INLINE Value weight_first(const Weight* p, int n) { return load_pairs_first(p, n); }
  VIVACE_INLINE Value input(const Input* p) { return load_pairs(p); }
  VIVACE_INLINE F32x16 accumulate(F32x16 acc, Value x, Value w) { return dot_bf16(acc, x, w); }
};

// ---------------------------------------------------------------- tiles

// Rows and outputs of a tile, by the registers there are: 32 of 16 lanes or 16 of 8. Up to
// kWideRows rows, more outputs at once make more streams from memory.
#if VIVACE_LEVEL >= 2
constexpr int kRows = 4, kOutputs = 6, kWideRows = 3, kWideOutputs = 8;
#else
constexpr int kRows = 3, kOutputs = 2, kWideRows = 1, kWideOutputs = 4;
#endif

// Brings the weights of the next tile into the second-level cache, bit by bit while this one is
// multiplied: two lines of each of its rows every `period` steps. Reading one line brings its pair.
struct Ahead {
  const char* position;
  size_t stride;     // from row to row
  int period, wait;  // in steps

  template <int NR>
  [[gnu::always_inline]] inline void advance() {
    if (--wait != 0) return;
    wait = period;
    VIVACE_UNROLL
    for (int n = 0; n < NR; ++n)
      __builtin_prefetch(position + static_cast<size_t>(n) * stride, 0, 2);
    position += 128;
  }
};

template <class F, int MR, int NR>
[[gnu::always_inline]] inline void multiply_tile(int K, const typename F::Weight* w, const char* x,
                                                 size_t x_stride, const float* bias, float* y,
                                                 int64_t ldy, Ahead& next) {
  F32x16 acc[MR][NR];
  VIVACE_UNROLL
  for (int m = 0; m < MR; ++m) VIVACE_UNROLL
  for (int n = 0; n < NR; ++n) acc[m][n] = zero();
  const size_t w_stride = static_cast<size_t>(K);
  Ahead ahead = next;
  int k = 0;
  for (; k + F::kStep <= K; k += F::kStep) {
    ahead.advance<NR>();
    typename F::Value weights[NR];
    VIVACE_UNROLL
    for (int n = 0; n < NR; ++n) weights[n] = F::weight(w + n * w_stride + k);
    VIVACE_UNROLL
    for (int m = 0; m < MR; ++m) {
      auto input = F::input(reinterpret_cast<const typename F::Input*>(x + m * x_stride) + k);
      VIVACE_UNROLL
      for (int n = 0; n < NR; ++n) acc[m][n] = F::accumulate(acc[m][n], input, weights[n]);
    }
  }
  next = ahead;
  if (k < K) {
    VIVACE_UNROLL
    for (int n = 0; n < NR; ++n) {
      auto weight = F::weight_first(w + n * w_stride + k, K - k);
      VIVACE_UNROLL
      for (int m = 0; m < MR; ++m)
        acc[m][n] = F::accumulate(
            acc[m][n], F::input(reinterpret_cast<const typename F::Input*>(x + m * x_stride) + k),
            weight);
    }
  }
  VIVACE_UNROLL
  for (int n = 0; n < NR; n += 4) {
    constexpr int M1 = MR > 1 ? 1 : 0, M2 = MR > 2 ? 2 : 0, M3 = MR > 3 ? 3 : 0;
    const int count = NR - n < 4 ? NR - n : 4;
    F32x16 folds[4];
    VIVACE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int at = n + (j < count ? j : 0);
      folds[j] = j < count ? fold4(acc[0][at], acc[M1][at], acc[M2][at], acc[M3][at]) : folds[0];
    }
    float sums[16];
    store(sums, reduce_folds(folds[0], folds[1], folds[2], folds[3]));
    if (bias != nullptr)
      for (int i = 0; i < 4 * MR; ++i)
        if (i % 4 < count) sums[i] += bias[n + i % 4];
    VIVACE_UNROLL
    for (int m = 0; m < MR; ++m)
      __builtin_memcpy(y + m * ldy + n, sums + m * 4, count * sizeof(float));
  }
}

template <class F, int NR>
void multiply_rows(int MR, int K, const typename F::Weight* w, const char* x, size_t x_stride,
                   const float* bias, float* y, int64_t ldy, Ahead& next) {
  if constexpr (kRows >= 4)
    if (MR == 4) return multiply_tile<F, 4, NR>(K, w, x, x_stride, bias, y, ldy, next);
  if constexpr (kRows >= 3)
    if (MR == 3) return multiply_tile<F, 3, NR>(K, w, x, x_stride, bias, y, ldy, next);
  if (MR == 2) return multiply_tile<F, 2, NR>(K, w, x, x_stride, bias, y, ldy, next);
  return multiply_tile<F, 1, NR>(K, w, x, x_stride, bias, y, ldy, next);
}

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
      multiply_rows<F, NR>(count, K, at, x + m * x_stride, x_stride,
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

void prepare(InputType type, int32_t first, int32_t K, const float* row, void* out) {
  int32_t k = first;
  if (type == InputType::bfloat16) {
    auto* to = static_cast<uint16_t*>(out);
    for (; k + 16 <= K; k += 16) store_bf16(to + k, load(row + k));
    if (k < K) store_bf16(to + k, load_first(row + k, K - k)), k += 16;
    if (k % 32 != 0) store_bf16(to + k, zero());
    return;
  }
  auto* to = static_cast<float*>(out);
  const bool rounds = type == InputType::float16;
  for (; k < K; k += 16) {
    F32x16 x = K - k < 16 ? load_first(row + k, K - k) : load(row + k);
    store(to + k, rounds ? round_to_f16(x) : x);
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
