// Row operations on one instruction set.
#include "functions.h"
#include "ops.h"
#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

// f(offset, count) for each vector of a row; count is below 16 only in the last one.
template <class F>
VIVACE_INLINE void for_vectors(int64_t size, F f) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) f(i, 16);
  if (i < size) f(i, static_cast<int>(size - i));
}

VIVACE_INLINE F32x16 load_some(const float* p, int count) {
  return count == 16 ? load(p) : load_first(p, count);
}

VIVACE_INLINE void store_some(float* p, F32x16 x, int count) {
  if (count == 16)
    store(p, x);
  else
    store_first(p, x, count);
}

// The sum of f(offset, count) over a row, in four chains of vectors and a fixed tree.
template <class F>
VIVACE_INLINE float sum_vectors(int64_t size, F f) {
  F32x16 sum[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 64 <= size; i += 64)
    for (int c = 0; c < 4; ++c) sum[c] = f(sum[c], i + 16 * c, 16);
  for (int c = 0; i < size; i += 16, ++c)
    sum[c] = f(sum[c], i, static_cast<int>(size - i < 16 ? size - i : 16));
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

void norm_row(const Norm& norm, const float* x, float* y) {
  const float size = static_cast<float>(norm.size);
  float mean = 0.0f;
  if (norm.kind == NormKind::layer)
    mean = sum_vectors(norm.size, [&](F32x16 sum, int64_t i,
                                      int count) { return add(sum, load_some(x + i, count)); }) /
           size;
  const F32x16 center = set1(mean);
  const float squares = sum_vectors(norm.size, [&](F32x16 sum, int64_t i, int count) {
    F32x16 off = sub(load_some(x + i, count), center);
    if (count < 16) off = select(first_lanes(count), off, zero());
    return fma(off, off, sum);
  });
  const F32x16 scale = set1(rsqrt1(squares / size + norm.eps));
  for_vectors(norm.size, [&](int64_t i, int count) {
    const F32x16 off = mul(sub(load_some(x + i, count), center), scale);
    const F32x16 weight = load_some(norm.weight + i, count);
    const F32x16 out =
        norm.bias ? fma(off, weight, load_some(norm.bias + i, count)) : mul(off, weight);
    store_some(y + i, out, count);
  });
}

void add_row(float* h, const float* x, float scale, int64_t size) {
  const F32x16 factor = set1(scale);
  for_vectors(size, [&](int64_t i, int count) {
    store_some(h + i, fma(load_some(x + i, count), factor, load_some(h + i, count)), count);
  });
}

VIVACE_INLINE F32x16 load_storage(Storage storage, const void* elements, int64_t i, int count) {
  const uint16_t* half = static_cast<const uint16_t*>(elements) + i;
  switch (storage) {
    case Storage::float32:
      return load_some(static_cast<const float*>(elements) + i, count);
    case Storage::bfloat16:
      return count == 16 ? load_bf16(half) : load_bf16_first(half, count);
    default:
      return count == 16 ? load_f16(half) : load_f16_first(half, count);
  }
}

void widen_row(Storage storage, const void* elements, float scale, float* y, int64_t size) {
  const F32x16 factor = set1(scale);
  for_vectors(size, [&](int64_t i, int count) {
    store_some(y + i, mul(load_storage(storage, elements, i, count), factor), count);
  });
}

void rotate_head(float* head, const float* cos, const float* sin, int half, bool is_interleaved) {
  if (is_interleaved) {
    for (int j = 0; j < half; ++j) {
      const float a = head[2 * j], b = head[2 * j + 1];
      head[2 * j] = fma1(-b, sin[j], a * cos[j]);
      head[2 * j + 1] = fma1(a, sin[j], b * cos[j]);
    }
    return;
  }
  for_vectors(half, [&](int64_t j, int count) {
    const F32x16 a = load_some(head + j, count), b = load_some(head + half + j, count);
    const F32x16 c = load_some(cos + j, count), s = load_some(sin + j, count);
    store_some(head + j, fma(negate(b), s, mul(a, c)), count);
    store_some(head + half + j, fma(a, s, mul(b, c)), count);
  });
}

template <class F>
VIVACE_INLINE void activate_with(F function, const float* gate, const float* up, float* y,
                                 int64_t size) {
  for_vectors(size, [&](int64_t i, int count) {
    F32x16 out = function(load_some(gate + i, count));
    if (up) out = mul(out, load_some(up + i, count));
    store_some(y + i, out, count);
  });
}

void activate_row(Activation activation, const float* gate, const float* up, float* y,
                  int64_t size) {
  switch (activation) {
    case Activation::silu:
      return activate_with([](F32x16 x) { return silu(x); }, gate, up, y, size);
    case Activation::gelu:
      return activate_with([](F32x16 x) { return gelu(x); }, gate, up, y, size);
    case Activation::gelu_tanh:
      return activate_with([](F32x16 x) { return gelu_tanh(x); }, gate, up, y, size);
    case Activation::relu:
      return activate_with([](F32x16 x) { return relu(x); }, gate, up, y, size);
  }
}

void soft_cap_row(float* x, float soft_cap, float scale, int64_t size) {
  if (soft_cap <= 0.0f && scale == 1.0f) return;
  const F32x16 factor = set1(scale), cap = set1(soft_cap), inverse = set1(1.0f / soft_cap);
  for_vectors(size, [&](int64_t i, int count) {
    F32x16 value = load_some(x + i, count);
    if (soft_cap > 0.0f) value = mul(cap, tanh(mul(value, inverse)));
    store_some(x + i, mul(value, factor), count);
  });
}

bool all_finite(Storage storage, const void* elements, int64_t size) {
  const F32x16 nothing = zero();
  F32x16 sum[4] = {nothing, nothing, nothing, nothing};  // infinity * 0 and NaN * 0 are NaN
  int64_t i = 0;
  for (; i + 64 <= size; i += 64)
    for (int c = 0; c < 4; ++c)
      sum[c] = fma(load_storage(storage, elements, i + 16 * c, 16), nothing, sum[c]);
  for (; i < size; i += 16)
    sum[0] =
        fma(load_storage(storage, elements, i, static_cast<int>(size - i < 16 ? size - i : 16)),
            nothing, sum[0]);
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) == 0.0f;
}

float maximum_of(const float* x, int64_t size, float* maxima, float* copy) {
  const F32x16 lowest = set1(-infinity()), top = set1(infinity()), one = set1(1.0f);
  F32x16 high = lowest;
  F32x16 odd[4] = {zero(), zero(), zero(), zero()};  // counts NaN and infinity
  for (int64_t tile = 0; tile < size; tile += 64) {
    F32x16 tile_high = lowest;
    for (int c = 0; c < 4; ++c) {
      const int64_t i = tile + 16 * c;
      if (i >= size) break;
      const int count = static_cast<int>(size - i < 16 ? size - i : 16);
      F32x16 value = load_some(x + i, count);
      if (copy) store_some(copy + i, value, count);
      if (count < 16) value = select(first_lanes(count), value, lowest);
      tile_high = max(value, tile_high);  // this order drops a NaN
      odd[c] = add(odd[c], select(less(value, top), zero(), one));
    }
    if (maxima) maxima[tile / 64] = reduce_max(tile_high);
    high = max(tile_high, high);
  }
  if (reduce_add(add(add(odd[0], odd[1]), add(odd[2], odd[3]))) > 0.0f)
    for (int64_t i = 0; i < size; ++i)
      if (x[i] != x[i]) return x[i];
  return reduce_max(high);
}

int64_t gather_from(const float* x, const float* maxima, float lowest, int64_t size, int32_t* ids,
                    float* values) {
  const F32x16 bound = set1(lowest);
  int64_t num_found = 0;
  for (int64_t i = 0; i < size; i += 16) {
    if (i % 64 == 0 && maxima[i / 64] < lowest) {
      i += 48;
      continue;
    }
    const int count = static_cast<int>(size - i < 16 ? size - i : 16);
    uint32_t bits = ~mask_bits(less(load_some(x + i, count), bound)) & ((1u << count) - 1);
    for (; bits != 0; bits &= bits - 1) {
      const int64_t id = i + __builtin_ctz(bits);
      ids[num_found] = static_cast<int32_t>(id);
      values[num_found++] = x[id];
    }
  }
  return num_found;
}

void exp_sums_row(const float* x, float maximum, float scale, float* y, float* sums, int64_t size) {
  const F32x16 top = set1(maximum), factor = set1(scale);
  const auto weigh = [&](int64_t i, int count) {
    const F32x16 weight = exp_not_above_zero(mul(sub(load_some(x + i, count), top), factor));
    if (y) store_some(y + i, weight, count);
    return weight;
  };
  int64_t tile = 0;
  for (; tile + 64 <= size; tile += 64) {
    F32x16 sum = weigh(tile, 16);
    for (int c = 1; c < 4; ++c) sum = add(sum, weigh(tile + 16 * c, 16));
    sums[tile / 64] = reduce_add(sum);
  }
  if (tile == size) return;
  F32x16 sum = zero();
  for (int64_t i = tile; i < size; i += 16) {
    const int count = static_cast<int>(size - i < 16 ? size - i : 16);
    sum = add(sum, select(first_lanes(count), weigh(i, count), zero()));
  }
  sums[tile / 64] = reduce_add(sum);
}

}  // namespace

extern const OpKernels op_kernels;
const OpKernels op_kernels = {norm_row,     add_row,    widen_row,  rotate_head, activate_row,
                              soft_cap_row, all_finite, maximum_of, gather_from, exp_sums_row};

}  // namespace vivace::VIVACE_ISA
