// tanh, erf and the activations, from `exp` of simd.h alone: the same bits on every instruction
// set.
#pragma once

#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

// tanh(x) with a relative error under 2e-6: a series where 1 - exp(-2x) would cancel.
VIVACE_INLINE F32x16 tanh(F32x16 x) {
  const F32x16 one = set1(1.0f), size = abs(x);
  const F32x16 decay = exp(mul(set1(-2.0f), size));
  const F32x16 far = div(sub(one, decay), add(one, decay));
  const F32x16 square = mul(x, x);  // Taylor series to x^13
  F32x16 series = set1(21844.0f / 6081075.0f);
  series = fma(series, square, set1(-1382.0f / 155925.0f));
  series = fma(series, square, set1(62.0f / 2835.0f));
  series = fma(series, square, set1(-17.0f / 315.0f));
  series = fma(series, square, set1(2.0f / 15.0f));
  series = fma(series, square, set1(-1.0f / 3.0f));
  const F32x16 near = fma(mul(size, square), series, size);
  const F32x16 magnitude = select(less(size, set1(0.4f)), near, far);
  return select(less(x, zero()), negate(magnitude), magnitude);
}

// erf(x): the rational approximation 7.1.26 of Abramowitz and Stegun, absolute error 1.5e-7.
VIVACE_INLINE F32x16 erf(F32x16 x) {
  const F32x16 one = set1(1.0f), size = abs(x);
  const F32x16 t = div(one, fma(set1(0.3275911f), size, one));
  F32x16 p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  const F32x16 far = sub(one, mul(mul(p, t), exp(negate(mul(size, size)))));
  return select(less(x, zero()), negate(far), far);
}

VIVACE_INLINE F32x16 silu(F32x16 x) {
  return div(x, add(set1(1.0f), exp(negate(x))));
}

VIVACE_INLINE F32x16 gelu(F32x16 x) {
  const F32x16 half = mul(set1(0.5f), x);
  return fma(half, erf(mul(x, set1(0.70710678f))), half);
}

VIVACE_INLINE F32x16 gelu_tanh(F32x16 x) {
  const F32x16 cube = mul(mul(x, x), x);
  const F32x16 inner = mul(set1(0.79788456f), fma(set1(0.044715f), cube, x));
  const F32x16 half = mul(set1(0.5f), x);
  return fma(half, tanh(inner), half);
}

VIVACE_INLINE F32x16 relu(F32x16 x) {
  return select(less(x, zero()), zero(), x);
}

}  // namespace
}  // namespace vivace::VIVACE_ISA
