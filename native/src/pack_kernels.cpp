// Rounding to integer codes on one instruction set: lanes are the 16 outputs of a panel.
//
// The arithmetic is that of techniques/weight_formats/_groupwise.py, operation by operation.
#include "pack.h"
#include "simd.h"

namespace vivace::VIVACE_ISA {
namespace {

constexpr int kMaxSteps = 4;  // of a group whose weights are kept between its two passes

// The weights of 32 inputs, turned: [input][output].
struct Step {
  alignas(64) float weights[kStepInputs][kPanelOutputs];
};

VIVACE_INLINE F32x16 load_weights(Storage storage, const void* weights, int64_t at, int count) {
  const float* wide = static_cast<const float*>(weights) + at;
  const uint16_t* narrow = static_cast<const uint16_t*>(weights) + at;
  const bool is_whole = count >= kLanes;
  switch (storage) {
    case Storage::bfloat16:
      return is_whole ? load_bf16(narrow) : load_bf16_first(narrow, count);
    case Storage::float16:
      return is_whole ? load_f16(narrow) : load_f16_first(narrow, count);
    default:
      return is_whole ? load(wide) : load_first(wide, count);
  }
}

// Inputs from `first` on; zeros stand for rows and inputs that are not there.
VIVACE_INLINE void load_step(const PackItem& item, int32_t first, Step& step) {
  alignas(64) float row[kPanelOutputs][kLanes];
  for (int half = 0; half < kStepInputs; half += kLanes) {
    const int32_t at = first + half, left = item.K - at;
    for (int output = 0; output < kPanelOutputs; ++output) {
      const bool is_there = output < item.rows && left > 0;
      const int64_t begin = static_cast<int64_t>(output) * item.K + at;
      store(row[output], is_there ? load_weights(item.storage, item.weights, begin, left) : zero());
    }
    for (int k = 0; k < kLanes; ++k)
      for (int output = 0; output < kPanelOutputs; ++output)
        step.weights[half + k][output] = row[output][k];
  }
}

struct Range {
  F32x16 lowest, highest;
  F32x16 not_finite;  // NaN where a weight is NaN or infinite, else zero

  VIVACE_MEMBER void take(const Step& step) {
    for (const float* weights : step.weights) {
      const F32x16 weight = load(weights);
      lowest = min(weight, lowest);  // this order of arguments passes over NaN
      highest = max(weight, highest);
      not_finite = add(not_finite, mul(weight, zero()));
    }
  }
};

// ---------------------------------------------------------------- scales

// Round to nearest even, denormals kept.
VIVACE_INLINE uint16_t round_to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// The smallest power of two that is not below |size|, as an exponent biased by 127; at least 1.
VIVACE_INLINE uint8_t round_up_to_e8m0(float size) {
  const uint32_t magnitude = bits_of(size) & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return 255;
  return static_cast<uint8_t>((magnitude >> 23) + ((magnitude & 0x7fffffu) != 0));
}

// Stores 16 scales and returns what they mean.
VIVACE_INLINE F32x16 store_scales(const Format& format, F32x16 wanted, uint8_t* out) {
  alignas(64) float values[kLanes], means[kLanes];
  switch (format.scale) {
    case ScaleType::float32:
      store(reinterpret_cast<float*>(out), wanted);
      return wanted;
    case ScaleType::float16:
      store_f16(reinterpret_cast<uint16_t*>(out), wanted);
      return load_f16(reinterpret_cast<const uint16_t*>(out));
    case ScaleType::bfloat16:
      store(values, wanted);
      for (int i = 0; i < kLanes; ++i) {
        const uint16_t scale = round_to_bf16(values[i]);
        __builtin_memcpy(out + 2 * i, &scale, sizeof(scale));
      }
      return load_bf16(reinterpret_cast<const uint16_t*>(out));
    case ScaleType::e8m0: {
      // The largest code is to reach the extreme within half a step.
      const float middle = static_cast<float>(1 << (format.bits - 1));
      const float reach = format.has_zeros ? 1.0f : middle / (middle - 0.5f);
      store(values, mul(wanted, set1(reach)));
      for (int i = 0; i < kLanes; ++i) {
        out[i] = round_up_to_e8m0(values[i]);
        means[i] = float_of(static_cast<uint32_t>(out[i]) << 23);
      }
      return load(means);
    }
  }
  return zero();
}

// ---------------------------------------------------------------- codes

VIVACE_INLINE F32x16 clip(F32x16 x, float low, float high) {
  return min(max(x, set1(low)), set1(high));  // NaN becomes `low`
}

// Ties to even; what lies beyond 512 is clipped later.
VIVACE_INLINE F32x16 round_to_whole(F32x16 x) {
  const F32x16 shift = set1(0x1.8p23f);
  return sub(add(clip(x, -512.0f, 512.0f), shift), shift);
}

struct Rounding {
  F32x16 inverse, zero_point;  // of each output
  float high;

  // A code as the lowest byte of each lane.
  VIVACE_MEMBER void codes(const float* weights, uint32_t* lanes) const {
    const F32x16 code = add(round_to_whole(mul(load(weights), inverse)), zero_point);
    alignas(64) float shifted[kLanes];
    store(shifted, add(clip(code, 0.0f, high), set1(0x1p23f)));
    for (int i = 0; i < kLanes; ++i) lanes[i] = bits_of(shifted[i]) & 0xffu;
  }
};

// `bits` vectors as CodesLayout says, of eight vectors of codes, one a byte.
VIVACE_INLINE void squeeze(int bits, const uint32_t (&codes)[8][kLanes], uint8_t* out) {
  uint32_t packed[8][kLanes];
  for (int i = 0; i < kLanes; ++i) {
    if (bits == 8) {
      for (int j = 0; j < 8; ++j) packed[j][i] = codes[j][i];
    } else if (bits == 4) {
      for (int v = 0; v < 4; ++v) packed[v][i] = codes[v][i] | codes[v + 4][i] << 4;
    } else {
      constexpr uint32_t kPairs = 0x03030303u, kThird = 0x01010101u;
      for (int v = 0; v < 2; ++v)
        packed[v][i] = (codes[v][i] & kPairs) | (codes[v + 2][i] & kPairs) << 2 |
                       (codes[v + 4][i] & kPairs) << 4 | (codes[v + 6][i] & kPairs) << 6;
      if (bits == 3) {
        packed[2][i] = 0;
        for (int j = 0; j < 8; ++j) packed[2][i] |= (codes[j][i] >> 2 & kThird) << j;
      }
    }
  }
  for (int v = 0; v < bits; ++v) __builtin_memcpy(out + v * kPanels * 64, packed[v], 64);
}

VIVACE_INLINE void encode_step(const Format& format, const Rounding& rounding, const Step& step,
                               int num_outputs, int num_inputs, uint8_t* out) {
  alignas(64) uint32_t codes[8][kLanes];
  for (int j = 0; j < 8; ++j) {
    alignas(64) uint32_t one[4][kLanes];
    for (int i = 0; i < 4; ++i) {
      rounding.codes(step.weights[4 * j + i], one[i]);
      if (4 * j + i >= num_inputs) __builtin_memset(one[i], 0, sizeof(one[i]));
    }
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t bytes = one[0][i] | one[1][i] << 8 | one[2][i] << 16 | one[3][i] << 24;
      codes[j][i] = i < num_outputs ? bytes : 0;
    }
  }
  squeeze(format.bits, codes, out);
}

// Stores the scales and zeros of a group; returns false as pack_panel does.
VIVACE_INLINE bool choose_scales(const Format& format, Range range, uint8_t* scales,
                                 uint8_t* stored_zeros, Rounding& rounding) {
  const float middle = static_cast<float>(1 << (format.bits - 1));
  const float high = static_cast<float>((1 << format.bits) - 1);
  F32x16 wanted;
  if (format.has_zeros) {
    range.lowest = min(range.lowest, zero());
    range.highest = max(range.highest, zero());
    wanted = div(sub(range.highest, range.lowest), set1(high));
  } else {
    const F32x16 extreme =
        select(less(negate(range.lowest), range.highest), range.highest, range.lowest);
    wanted = div(extreme, set1(-middle));
  }
  wanted = add(wanted, range.not_finite);
  const F32x16 scale = store_scales(format, wanted, scales);
  const F32x16 size = abs(scale);
  const F32x16 inverse = select(less(size, set1(0x1p-126f)), zero(), div(set1(1.0f), scale));
  rounding = {inverse, set1(middle), high};
  if (format.has_zeros) {
    rounding.zero_point = clip(round_to_whole(mul(negate(range.lowest), inverse)), 0.0f, high);
    alignas(64) float zeros[kLanes];
    store(zeros, rounding.zero_point);
    for (int i = 0; i < kLanes; ++i)
      stored_zeros[i] = static_cast<uint8_t>(static_cast<int>(zeros[i]));
  }
  alignas(64) float sizes[kLanes], not_finite[kLanes];
  store(sizes, size);
  store(not_finite, range.not_finite);
  bool fits = true;
  for (int i = 0; i < kLanes; ++i) fits &= sizes[i] < infinity() || not_finite[i] != 0;
  return fits;
}

bool pack_panel(const Format& format, const CodesLayout& layout, const PackItem& item) {
  const int32_t group_steps = layout.group_steps;
  const bool is_kept = group_steps <= kMaxSteps;
  const size_t panel = static_cast<size_t>(item.panel);
  const size_t scales_at = panel * kPanelOutputs * scale_bytes(format.scale);
  const size_t zeros_at = layout.zeros_at + panel * kPanelOutputs;
  const size_t codes_at = layout.codes_at + panel * 64;
  Step steps[kMaxSteps];
  bool fits = true;
  for (int32_t group = 0; group < layout.num_groups; ++group) {
    uint8_t* out = item.unit + static_cast<size_t>(group) * layout.group_bytes;
    const int32_t first = group * group_steps;
    Range range = {set1(infinity()), set1(-infinity()), zero()};
    for (int32_t i = 0; i < group_steps; ++i) {
      Step& step = steps[is_kept ? i : 0];
      load_step(item, (first + i) * kStepInputs, step);
      range.take(step);
    }
    Rounding rounding;
    fits &= choose_scales(format, range, out + scales_at, out + zeros_at, rounding);
    for (int32_t i = 0; i < group_steps; ++i) {
      Step& step = steps[is_kept ? i : 0];
      const int32_t at = (first + i) * kStepInputs;
      if (!is_kept) load_step(item, at, step);
      encode_step(format, rounding, step, item.rows, item.K - at,
                  out + codes_at + static_cast<size_t>(i) * layout.step_bytes);
    }
  }
  return fits;
}

}  // namespace

extern const PackKernels pack_kernels;
const PackKernels pack_kernels = {pack_panel};

}  // namespace vivace::VIVACE_ISA
