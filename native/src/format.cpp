#include "format.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "block_formats.h"
#include "isa.h"

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
// Of ScaleType and of TableScale, which has one more.
const char* const kScaleNames[] = {"float32", "float16", "bfloat16", "e8m0", "e4m3"};

size_t round_up(size_t size, size_t unit) {
  return (size + unit - 1) / unit * unit;
}

[[noreturn]] void fail(const std::string& name) {
  throw std::invalid_argument("no kernel for the format '" + name +
                              "': expected a name such as bfloat16, q4_k, int4/32/float16 or "
                              "table/e2m1/32/e8m0");
}

std::string to_lower(std::string name) {
  for (char& c : name)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return name;
}

// Two groups of 16 lie together.
void check_group(int32_t group, int32_t K) {
  const int32_t together = group == 16 ? 32 : group;
  if (group != 0 && K % together != 0)
    throw std::invalid_argument("rows of " + std::to_string(K) + " weights do not divide into " +
                                (group == 16 ? "pairs of groups of " : "groups of ") +
                                std::to_string(group));
}

std::vector<std::string> split(const std::string& name, char at = '/') {
  std::vector<std::string> parts;
  for (size_t first = 0; first <= name.size();) {
    const size_t end = std::min(name.find(at, first), name.size());
    parts.push_back(name.substr(first, end - first));
    first = end + 1;
  }
  return parts;
}

// The place of a name, or one past the last.
ptrdiff_t find_scale(const std::string& name) {
  const auto* scale = std::find(std::begin(kScaleNames), std::end(kScaleNames), name);
  return scale - std::begin(kScaleNames);
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
  const auto scale = find_scale(parts[2]);
  if (scale > static_cast<ptrdiff_t>(ScaleType::e8m0)) fail(name);
  format.scale = static_cast<ScaleType>(scale);
  if (parts.size() == 4 && parts[3] != "zeros") fail(name);
  format.has_zeros = parts.size() == 4;
  format.input = {InputType::int8, format.group == 0 ? kRowInputGroup : format.group,
                  format.has_zeros ? 1 : 1 << (format.bits - 1)};
  return format;
}

// The value of a code of 1 sign bit and bits of exponent and mantissa, without infinities.
float small_float(int code, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = code & ((1 << mantissa_bits) - 1);
  const int whole = exponent == 0 ? mantissa : mantissa + (1 << mantissa_bits);
  const float size =
      std::ldexp(static_cast<float>(whole), std::max(exponent, 1) - bias - mantissa_bits);
  return code >> (exponent_bits + mantissa_bits) ? -size : size;
}

// Sets what a code stands for, and its bits: "e2m1", or all numbers.
bool set_values(Format& format, const std::string& name) {
  if (name == "e4m3" || name == "e5m2") {
    format.table = name == "e4m3" ? TableKind::e4m3 : TableKind::e5m2;
    format.bits = 8;
    return true;
  }
  if (name.size() == 4 && name[0] == 'e' && name[2] == 'm') {
    const int exponent = name[1] - '0', mantissa = name[3] - '0';
    format.bits = 1 + exponent + mantissa;
    if (exponent < 1 || mantissa < 0 || (format.bits != 3 && format.bits != 4 && format.bits != 6))
      return false;
    for (int code = 0; code < 1 << format.bits; ++code)
      format.values[code] = small_float(code, exponent, mantissa);
    return true;
  }
  const std::vector<std::string> numbers = split(name, ',');
  format.bits = numbers.size() == 8 ? 3 : numbers.size() == 16 ? 4 : numbers.size() == 64 ? 6 : 0;
  for (size_t i = 0; format.bits != 0 && i < numbers.size(); ++i) {
    const char* end = numbers[i].data() + numbers[i].size();
    const auto [at, error] = std::from_chars(numbers[i].data(), end, format.values[i]);
    if (error != std::errc() || at != end || !std::isfinite(format.values[i])) return false;
  }
  return format.bits != 0;
}

Format table_from_name(const std::string& name) {
  const std::vector<std::string> parts = split(name);
  Format format;
  format.storage = Storage::table;
  format.input = {InputType::bfloat16};
  if (parts.size() < 4 || parts.size() > 5 || !set_values(format, parts[1])) fail(name);
  for (int32_t group : {16, 32, 64, 128})
    if (parts[2] == std::to_string(group)) format.group = group;
  if (format.group == 0 && parts[2] != "row") fail(name);
  const auto scale = find_scale(parts[3]);
  if (scale > static_cast<ptrdiff_t>(TableScale::e4m3)) fail(name);
  format.table_scale = static_cast<TableScale>(scale);
  format.is_signed = parts.size() == 5;
  if (format.is_signed && parts[4] != "signed") fail(name);
  if (format.group == 16 && (format.bits > 4 || format.is_signed)) fail(name);
  if (format.is_signed && format.bits == 8) fail(name);
  return format;
}

Format codebook_from_name(const std::string& name) {
  const std::vector<std::string> parts = split(name);
  Format format;
  format.storage = Storage::table;
  format.input = {InputType::bfloat16};
  format.table = TableKind::per_row;
  if (parts.size() != 3 || (parts[1] != "3" && parts[1] != "4")) fail(name);
  format.bits = parts[1][0] - '0';
  const char* end = parts[2].data() + parts[2].size();
  const auto [at, error] = std::from_chars(parts[2].data(), end, format.num_outliers);
  if (error != std::errc() || at != end || format.num_outliers < 0) fail(name);
  return format;
}

template <class Block>
std::pair<int32_t, size_t> shape_of() {
  return {Block::kWeights, sizeof(Block)};
}

// Weights and bytes of a block.
std::pair<int32_t, size_t> block_shape(const Format& format) {
  switch (format.storage) {
    case Storage::q4_0:
      return shape_of<BlockQ4_0>();
    case Storage::q8_0:
      return shape_of<BlockQ8_0>();
    case Storage::q4_k:
      return shape_of<BlockQ4_K>();
    case Storage::q6_k:
      return shape_of<BlockQ6_K>();
    default: {
      const BlockFormat& block = select_kernels("generic").blocks->formats[format.block];
      return {block.weights, block.bytes};
    }
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
  const BlockKernels& blocks = *select_kernels("generic").blocks;
  for (int i = 0; i < blocks.num_formats; ++i) {
    if (name != to_lower(blocks.formats[i].name)) continue;
    Format format;
    format.storage = Storage::blocks;
    format.input = {InputType::bfloat16};
    format.block = i;
    return format;
  }
  if (name.starts_with("table/")) return table_from_name(name);
  if (name.starts_with("codebook/")) return codebook_from_name(name);
  return codes_from_name(name);
}

bool is_float(const Format& format) {
  return format.storage <= Storage::float16;
}

bool is_decoded(const Format& format) {
  return format.storage == Storage::table || format.storage == Storage::blocks;
}

size_t element_bytes(const Format& format) {
  return format.storage == Storage::float32 ? 4 : 2;
}

size_t scale_bytes(ScaleType type) {
  return type == ScaleType::float32 ? 4 : type == ScaleType::e8m0 ? 1 : 2;
}

size_t scale_bytes(TableScale type) {
  if (type == TableScale::none) return 0;
  return type == TableScale::e4m3 ? 1 : scale_bytes(static_cast<ScaleType>(type));
}

TableLayout table_layout(const Format& format, int32_t K) {
  check_group(format.group, K);
  if (format.num_outliers > 0 && (format.num_outliers > K || K > 1 << 16))
    throw std::invalid_argument(std::to_string(format.num_outliers) + " outliers in rows of " +
                                std::to_string(K) + " weights: expected fewer, in at most 65536");
  const auto steps = static_cast<int32_t>((int64_t{K} + kStepInputs - 1) / kStepInputs);
  TableLayout layout;
  layout.block_steps =
      format.group == 0 ? steps : std::max(format.group, kStepInputs) / kStepInputs;
  layout.block_scales = format.group == 16 || format.is_signed ? 2 : 1;
  layout.blocks_at = format.table_scale == TableScale::e4m3 ? sizeof(float)
                     : format.table == TableKind::per_row   ? size_t{2} << format.bits
                                                            : 0;
  layout.codes_in_block = layout.block_scales * scale_bytes(format.table_scale);
  const size_t step_bytes = size_t{kStepInputs} / 8 * format.bits;
  layout.block_bytes = layout.codes_in_block + layout.block_steps * step_bytes;
  const int32_t blocks = (steps + layout.block_steps - 1) / layout.block_steps;
  layout.outliers_at = layout.blocks_at + blocks * layout.block_bytes;
  layout.bytes = layout.outliers_at + size_t{4} * format.num_outliers;
  return layout;
}

CodesLayout codes_layout(const Format& format, int32_t K) {
  check_group(format.group, K);
  CodesLayout layout;
  layout.num_groups = format.group == 0 ? 1 : K / format.group;
  const int64_t group = format.group == 0 ? int64_t{K} + kStepInputs - 1 : format.group;
  layout.group_steps = static_cast<int32_t>(group / kStepInputs);
  constexpr size_t kOutputs = size_t{kPanels} * kPanelOutputs;
  layout.zeros_at = kOutputs * scale_bytes(format.scale);
  layout.codes_at = layout.zeros_at + (format.has_zeros ? kOutputs : 0);
  layout.step_bytes = static_cast<size_t>(kPanels) * format.bits * 64;
  layout.group_bytes = layout.codes_at + layout.group_steps * layout.step_bytes;
  layout.bytes = layout.num_groups * layout.group_bytes;
  return layout;
}

int32_t unit_outputs(const Format& format) {
  if (is_float(format) || is_decoded(format)) return 1;
  return format.storage == Storage::codes ? kPanels * kPanelOutputs : kPanelOutputs;
}

size_t unit_bytes(const Format& format, int32_t K) {
  if (is_float(format)) return static_cast<size_t>(K) * element_bytes(format);
  if (format.storage == Storage::codes) return codes_layout(format, K).bytes;
  if (format.storage == Storage::table) return table_layout(format, K).bytes;
  const auto [weights, bytes] = block_shape(format);
  if (K % weights != 0)
    throw std::invalid_argument("rows of " + std::to_string(K) + " weights do not divide into " +
                                "blocks of " + std::to_string(weights));
  return static_cast<size_t>(K / weights) * bytes * unit_outputs(format);
}

size_t matrix_bytes(const Format& format, int32_t rows, int32_t K) {
  const int32_t unit = unit_outputs(format);
  if (format.storage != Storage::codes && rows % unit != 0)
    throw std::invalid_argument("a matrix of " + std::to_string(rows) +
                                " rows of blocks: expected a multiple of " + std::to_string(unit));
  return (static_cast<size_t>(rows) + unit - 1) / unit * unit_bytes(format, K);
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
  if (format.storage == Storage::codes) {
    const CodesLayout layout = codes_layout(format, K);
    const auto* group = static_cast<const uint8_t*>(unit);
    bool finite = true;
    for (int32_t i = 0; i < layout.num_groups; ++i, group += layout.group_bytes)
      finite &= are_finite_scales(format.scale, group, int64_t{kPanels} * kPanelOutputs);
    return finite;
  }
  const int64_t num_blocks = int64_t{K} / block_shape(format).first * kPanelOutputs;
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
