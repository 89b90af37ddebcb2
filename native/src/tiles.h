// Tiles of dot products on row-major weights: one vector of partial sums per output.
//
// Output (m, n) is one accumulator of 16 lanes that walks K in order, then reduce_add's tree. Tiles
// only group outputs; they never change what an output sums.
#pragma once

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

template <int MR, int NR>
struct Sums {
  F32x16 at[MR][NR];
};

template <int MR, int NR>
VIVACE_INLINE void clear(Sums<MR, NR>& sums) {
  VIVACE_UNROLL
  for (int m = 0; m < MR; ++m) VIVACE_UNROLL
  for (int n = 0; n < NR; ++n) sums.at[m][n] = zero();
}

// Takes K steps of MR rows and NR outputs; strides of w are in elements, of x in bytes.
template <class F, int MR, int NR>
VIVACE_INLINE void accumulate(Sums<MR, NR>& sums, int K, const typename F::Weight* w,
                              size_t w_stride, const char* x, size_t x_stride, Ahead& next) {
  auto& acc = sums.at;
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
}

// Adds up the lanes of each output, and its bias.
template <int MR, int NR>
VIVACE_INLINE void finish(const Sums<MR, NR>& sums, const float* bias, float* y, int64_t ldy) {
  const auto& acc = sums.at;
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
    float totals[16];
    store(totals, reduce_folds(folds[0], folds[1], folds[2], folds[3]));
    if (bias != nullptr)
      for (int i = 0; i < 4 * MR; ++i)
        if (i % 4 < count) totals[i] += bias[n + i % 4];
    VIVACE_UNROLL
    for (int m = 0; m < MR; ++m)
      __builtin_memcpy(y + m * ldy + n, totals + m * 4, count * sizeof(float));
  }
}

template <class F, int MR, int NR>
[[gnu::always_inline]] inline void multiply_tile(int K, const typename F::Weight* w,
                                                 size_t w_stride, const char* x, size_t x_stride,
                                                 const float* bias, float* y, int64_t ldy,
                                                 Ahead& next) {
  Sums<MR, NR> sums;
  clear(sums);
  accumulate<F>(sums, K, w, w_stride, x, x_stride, next);
  finish(sums, bias, y, ldy);
}

template <class F, int NR>
void multiply_rows(int MR, int K, const typename F::Weight* w, size_t w_stride, const char* x,
                   size_t x_stride, const float* bias, float* y, int64_t ldy, Ahead& next) {
  if constexpr (kRows >= 4)
    if (MR == 4) return multiply_tile<F, 4, NR>(K, w, w_stride, x, x_stride, bias, y, ldy, next);
  if constexpr (kRows >= 3)
    if (MR == 3) return multiply_tile<F, 3, NR>(K, w, w_stride, x, x_stride, bias, y, ldy, next);
  if (MR == 2) return multiply_tile<F, 2, NR>(K, w, w_stride, x, x_stride, bias, y, ldy, next);
  return multiply_tile<F, 1, NR>(K, w, w_stride, x, x_stride, bias, y, ldy, next);
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
