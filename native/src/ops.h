// What a step does between linears and attention: one row at a time, so that no row knows another.
#pragma once

#include <cstdint>

#include "linear.h"

namespace vivace {

enum class NormKind : int { none, rms, layer };
enum class Activation : int { silu, gelu, gelu_tanh, relu };

struct Norm {
  NormKind kind = NormKind::none;
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0.0f;
  int size = 0;
};

// ---- one table per instruction set, defined in ops_kernels.cpp. Pointers may not overlap unless
// they are equal.

struct OpKernels {
  void (*norm)(const Norm& norm, const float* x, float* y);
  // h += scale * x
  void (*add)(float* h, const float* x, float scale, int64_t size);
  // y = scale * elements of a float format
  void (*widen)(Storage storage, const void* elements, float scale, float* y, int64_t size);
  // Rotates pairs of a head in place: cos and sin [half].
  void (*rotate)(float* head, const float* cos, const float* sin, int half, bool is_interleaved);
  // y = act(gate) * up, or act(gate) where up is null
  void (*activate)(Activation activation, const float* gate, const float* up, float* y,
                   int64_t size);
  // x = scale * soft_cap * tanh(x / soft_cap); soft_cap 0: x = scale * x
  void (*soft_cap)(float* x, float soft_cap, float scale, int64_t size);
  bool (*is_finite)(Storage storage, const void* elements, int64_t size);
  // The largest value; NaN if any value is NaN. Unless null: `maxima` [ceil(size / 64)] get the
  // largest of each 64, and `copy` [size] the values.
  float (*maximum)(const float* x, int64_t size, float* maxima, float* copy);
  // Those that are at least `lowest`, in order: `ids` and `values` [size]. Returns their number.
  // `maxima` as above: tiles below are not read.
  int64_t (*gather)(const float* x, const float* maxima, float lowest, int64_t size, int32_t* ids,
                    float* values);
  // y = exp((x - maximum) * scale) of values up to the maximum, with the sum of each 64 in `sums`
  // [ceil(size / 64)]; y may be null.
  void (*exp_sums)(const float* x, float maximum, float scale, float* y, float* sums, int64_t size);
};

}  // namespace vivace
