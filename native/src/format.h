// How a matrix is stored and what its inputs are rounded to before they are multiplied.
//
// Row-major formats are read where a file is mapped. `codes` lie in panels of 16 outputs, so that
// a vector's lanes are outputs: see CodesLayout. `table` and `blocks` are compressed bfloat16: what
// they mean is the matrix of bfloat16 that they decode to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace vivace {

enum class Storage : uint8_t {
  float32,
  bfloat16,
  float16,
  codes,
  q4_0,
  q8_0,
  q4_k,
  q6_k,
  table,
  blocks,  // of GGUF, all kinds that no kernel reads as whole numbers
};
enum class ScaleType : uint8_t { float32, float16, bfloat16, e8m0 };  // e8m0: 2^(byte - 127)
// Of a table. e4m3: a float of 8 bits times a factor of the row. none: values are weights.
enum class TableScale : uint8_t { float32, float16, bfloat16, e8m0, e4m3, none };

// What a code of a table stands for: one of listed values, one of values that stand at the start of
// each row, or itself, as a float of 8 bits.
enum class TableKind : uint8_t { listed, per_row, e4m3, e5m2 };
constexpr int kMaxTableValues = 64;

// int8: whole numbers -127..127 with a float32 scale for each `group` inputs, and their sums times
// `zero`, which is what codes with that zero have too much.
enum class InputType : uint8_t { float32, bfloat16, float16, int8 };

struct InputFormat {
  InputType type = InputType::float32;
  int32_t group = 0, zero = 1;
  friend bool operator==(const InputFormat&, const InputFormat&) = default;
};

struct Format {
  Storage storage = Storage::float32;
  InputFormat input;
  // Of `codes`: weight = scale * (code - zero), codes of `bits` bits. `group` weights along K share
  // scale and zero; 0: a whole row. Without stored zeros, zero is 2^(bits - 1).
  int bits = 0;
  int32_t group = 0;
  ScaleType scale = ScaleType::float32;
  bool has_zeros = false;
  // Of `table`: weight = scale * value of a code of 3, 4, 6 or 8 bits, rounded to bfloat16.
  TableKind table = TableKind::listed;
  TableScale table_scale = TableScale::none;
  float values[kMaxTableValues] = {};  // if listed
  bool is_signed = false;              // a group has two scales, the second for values below zero
  int32_t num_outliers = 0;            // weights of a row that are stored beside it
  // Of `blocks`: the place in BlockKernels::formats.
  int32_t block = 0;
};

constexpr int kPanelOutputs = 16;
constexpr int kPanels = 4;       // that lie together
constexpr int kStepInputs = 32;  // inputs whose codes lie together

// A unit of four panels of 16 outputs, one stretch of memory that is read from its start to its
// end: for each group of inputs scales [4][16], zeros [4][16] bytes, and the codes of its steps of
// 32 inputs, [bits][4] vectors of 64 bytes. Byte 4 o + i of a vector holds codes of output o of its
// panel and inputs k = 4 j + i:
//   8 bits: vector j.           4 bits: vector v, low half j = v, high half j = v + 4.
//   2 bits: vector v, bits 2 c: j = v + 2 c.
//   3 bits: two vectors as for 2 bits, then one whose bit j is the third bit.
// All parts are multiples of 64 bytes.
struct CodesLayout {
  int32_t num_groups, group_steps;
  size_t zeros_at, codes_at;  // in a group
  size_t step_bytes, group_bytes, bytes;
};
CodesLayout codes_layout(const Format& format, int32_t K);

// A row of a table: a float32 factor if scales are e4m3, or 2^bits bfloat16 values if they are its
// own; then blocks, each of its scales and the codes of their weights; then as many uint16 columns
// and bfloat16 values as there are outliers. A block has one group, two of 16 weights, or the row.
//
// Codes lie in steps of 32 weights, as in GGUF's blocks:
//   4 bits: 16 bytes; weight i is the low half of byte i, weight i + 16 its high half.
//   3 bits: 8 bytes, weight i + 8 j in bits 2 j of byte i; then 4 bytes whose bit i is the third.
//   6 bits: 16 bytes as for 4 bits, then 8 bytes as for 3 bits that hold the upper two.
//   8 bits: 32 bytes.
struct TableLayout {
  int32_t block_steps;                            // of 32 weights
  int32_t block_scales;                           // number
  size_t blocks_at, block_bytes, codes_in_block;  // codes_in_block: from where on in a block
  size_t outliers_at, bytes;
};
TableLayout table_layout(const Format& format, int32_t K);

// By name, such as "bfloat16", "q4_k", "int4/32/float16/zeros" (bits, group or "row", type of
// scales), "table/e2m1/32/e8m0" (values, group, type of scales; "signed" for two of them) or
// "codebook/4/10" (bits, outliers). Values are a float type, or numbers with commas between.
// Throws std::invalid_argument.
Format format_from_name(const std::string& name);

bool is_float(const Format& format);         // elements one by one
bool is_decoded(const Format& format);       // compressed bfloat16, row-major
size_t element_bytes(const Format& format);  // of a float format
size_t scale_bytes(ScaleType type);
size_t scale_bytes(TableScale type);

// Outputs that lie together: a matrix is cut between multiples of it only.
int32_t unit_outputs(const Format& format);
// Bytes of a unit of outputs. Throws std::invalid_argument if K is not a multiple of the group.
size_t unit_bytes(const Format& format, int32_t K);
size_t matrix_bytes(const Format& format, int32_t rows, int32_t K);

// Bytes of a prepared row, a multiple of 64.
size_t input_bytes(const InputFormat& input, int32_t K);

// What a prepared row of type int8 has for each group of its whole numbers.
struct InputScale {
  float scale;
  int32_t offset;  // -zero * sum
};

// Where it has what: K whole numbers padded with zeros, an InputScale for each group, and for each
// the float32 scale * -sum.
struct Int8Layout {
  int32_t padded_K, num_groups;
  size_t scales_at, products_at, bytes;
};
Int8Layout int8_layout(const InputFormat& input, int32_t K);

// False if a scale of a format of integers is NaN or infinite. Codes always are finite.
bool has_finite_scales(const Format& format, int32_t K, const void* unit);

}  // namespace vivace
