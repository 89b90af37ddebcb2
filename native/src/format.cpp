#include "format.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "block_formats.h"

namespace vivace {

namespace {

constexpr int32_t kRowInputGroup = 128;  // of inputs, where weights have one scale a row

struct Named {
  const char* name;
  Format format;
};

const Named kNamed[] = {
    {"float32", {Storage::float32, {InputType::float32}}},
    {"bfloat16", {Storage::bfloat16, {InputType::bfloat16}}},
    {"bfloat16_float32", {Storage::bfloat16, {InputType::float32}}},
    {"float16", {Storage::float16, {InputType::float16}}},
    {"float16_float32", {Storage::float16, {InputType::float32}}},
    {"q4_0", {Storage::q4_0, {InputType::int8, 32, 8}}},
    {"q8_0", {Storage::q8_0, {InputType::int8, 32, 128}}},
    {"q4_k", {Storage::q4_k, {InputType::int8, 32, 0}}},
    {"q6_k", {Storage::q6_k, {InputType::int8, 16, 32}}},
};
const char* const kScaleNames[] = {"float32", "float16", "bfloat16", "e8m0"};

size_t round_up(size_t size, size_t unit) {
  return (size + unit - 1) / unit * unit;
}

[[noreturn]] void fail(const std::string& name) {
  throw std::invalid_argument("no kernel for the format '" + name +
                              "': expected a name such as bfloat16, q4_k or int4/32/float16");
}

std::vector<std::string> split(const std::string& name) {
  std::vector<std::string> parts;
  for (size_t first = 0; first <= name.size();) {
    const size_t end = std::min(name.find('/', first), name.size());
    parts.push_back(name.substr(first, end - first));
    first = end + 1;
  }
  return parts;
}

Format codes_from_name(const std::string& name) {
  const std::vector<std::string> parts = split(name);
  Format format;
  format.storage = Storage::codes;
  if (parts.size() < 3 || parts.size() > 4 || parts[0].size() != 4 ||
      parts[0].substr(0, 3) != "int")
    fail(name);
  format.bits = parts[0][3] - '0';
  if (format.bits != 2 && format.bits != 3 && format.bits != 4 && format.bits != 8) fail(name);
  for (int32_t group : {32, 64, 128})
    if (parts[1] == std::to_string(group)) format.group = group;
  if (format.group == 0 && parts[1] != "row") fail(name);
  const auto* scale = std::find(std::begin(kScaleNames), std::end(kScaleNames), parts[2]);
  if (scale == std::end(kScaleNames)) fail(name);
  format.scale = static_cast<ScaleType>(scale - std::begin(kScaleNames));
  if (parts.size() == 4 && parts[3] != "zeros") fail(name);
  format.has_zeros = parts.size() == 4;
  format.input = {InputType::int8, format.group == 0 ? kRowInputGroup : format.group,
                  format.has_zeros ? 1 : 1 << (format.bits - 1)};
  return format;
}

// Weights and bytes of a block, or zeros for formats without blocks.
std::pair<int32_t, size_t> block_shape(Storage storage) {
  switch (storage) {
    case Storage::q4_0:
      return {BlockQ4_0::kWeights, sizeof(BlockQ4_0)};
    case Storage::q8_0:
      return {BlockQ8_0::kWeights, sizeof(BlockQ8_0)};
    case Storage::q4_k:
      return {BlockQ4_K::kWeights, sizeof(BlockQ4_K)};
    case Storage::q6_k:
      return {BlockQ6_K::kWeights, sizeof(BlockQ6_K)};
    default:
      return {0, 0};
  }
}

bool is_finite_half(const uint8_t* bytes) {
  return (bytes[1] & 0x7c) != 0x7c;
}

template <class Block>
bool are_finite(const void* row, int64_t num_blocks) {
  const Block* blocks = static_cast<const Block*>(row);
  bool finite = true;
  for (int64_t i = 0; i < num_blocks; ++i) {
    finite &= is_finite_half(blocks[i].scale);
    if constexpr (requires { blocks[i].minimum; }) finite &= is_finite_half(blocks[i].minimum);
  }
  return finite;
}

bool are_finite_scales(ScaleType type, const uint8_t* scales, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    switch (type) {
      case ScaleType::float32:
        finite &= !((scales[4 * i + 3] & 0x7f) == 0x7f && (scales[4 * i + 2] & 0x80));
        break;
      case ScaleType::float16:
        finite &= is_finite_half(scales + 2 * i);
        break;
      case ScaleType::bfloat16:
        finite &= !((scales[2 * i + 1] & 0x7f) == 0x7f && (scales[2 * i] & 0x80));
        break;
      case ScaleType::e8m0:
        finite &= scales[i] != 0xff;
        break;
    }
  }
  return finite;
}

}  // namespace

Format format_from_name(const std::string& name) {
  for (const Named& known : kNamed)
    if (name == known.name) return known.format;
  return codes_from_name(name);
}

bool is_float(const Format& format) {
  return format.storage <= Storage::float16;
}

size_t element_bytes(const Format& format) {
  return format.storage == Storage::float32 ? 4 : 2;
}

size_t scale_bytes(ScaleType type) {
  return type == ScaleType::float32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
}

PanelLayout panel_layout(const Format& format, int32_t K) {
  if (format.group != 0 && K % format.group != 0)
    throw std::invalid_argument("rows of " + std::to_string(K) + " weights do not divide into " +
                                "groups of " + std::to_string(format.group));
  PanelLayout layout;
  layout.num_groups = format.group == 0 ? 1 : K / format.group;
  const size_t values = static_cast<size_t>(layout.num_groups) * kPanelOutputs;
  layout.zeros_at = values * scale_bytes(format.scale);
  layout.codes_at = round_up(layout.zeros_at + (format.has_zeros ? values : 0), 64);
  const size_t steps = (static_cast<size_t>(K) + kStepInputs - 1) / kStepInputs;
  layout.bytes = layout.codes_at + steps * format.bits * 64;
  return layout;
}

int32_t unit_outputs(const Format& format) {
  return is_float(format) ? 1 : kPanelOutputs;
}

size_t unit_bytes(const Format& format, int32_t K) {
  if (is_float(format)) return static_cast<size_t>(K) * element_bytes(format);
  if (format.storage == Storage::codes) return panel_layout(format, K).bytes;
  const auto [weights, bytes] = block_shape(format.storage);
  if (K % weights != 0)
    throw std::invalid_argument("rows of " + std::to_string(K) + " weights do not divide into " +
                                "blocks of " + std::to_string(weights));
  return static_cast<size_t>(K / weights) * bytes * kPanelOutputs;
}

size_t matrix_bytes(const Format& format, int32_t rows, int32_t K) {
  const int32_t unit = unit_outputs(format);
  if (!is_float(format) && format.storage != Storage::codes && rows % unit != 0)
    throw std::invalid_argument("a matrix of " + std::to_string(rows) +
                                " rows of blocks: expected a multiple of " + std::to_string(unit));
  return static_cast<size_t>((rows + unit - 1) / unit) * unit_bytes(format, K);
}

Int8Layout int8_layout(const InputFormat& input, int32_t K) {
  Int8Layout layout;
  layout.padded_K = static_cast<int32_t>(round_up(K, std::max(input.group, kStepInputs)));
  layout.num_groups = layout.padded_K / input.group;
  layout.scales_at = round_up(layout.padded_K, 64);
  layout.products_at = layout.scales_at + round_up(layout.num_groups * sizeof(InputScale), 64);
  layout.bytes = layout.products_at + round_up(layout.num_groups * sizeof(float), 64);
  return layout;
}

size_t input_bytes(const InputFormat& input, int32_t K) {
  if (input.type == InputType::int8) return int8_layout(input, K).bytes;
  return round_up(static_cast<size_t>(K) * (input.type == InputType::bfloat16 ? 2 : 4), 64);
}

bool has_finite_scales(const Format& format, int32_t K, const void* unit) {
  if (format.storage == Storage::codes)
    return are_finite_scales(format.scale, static_cast<const uint8_t*>(unit),
                             int64_t{panel_layout(format, K).num_groups} * kPanelOutputs);
  const int64_t num_blocks = int64_t{K} / block_shape(format.storage).first * kPanelOutputs;
  switch (format.storage) {
    case Storage::q4_0:
      return are_finite<BlockQ4_0>(unit, num_blocks);
    case Storage::q8_0:
      return are_finite<BlockQ8_0>(unit, num_blocks);
    case Storage::q4_k:
      return are_finite<BlockQ4_K>(unit, num_blocks);
    default:
      return are_finite<BlockQ6_K>(unit, num_blocks);
  }
}

}  // namespace vivace
