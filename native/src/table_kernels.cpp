// Linear layers on compressed bfloat16: rows of a tile are decoded, then multiplied as bfloat16.
//
// For few rows of x a tile's outputs are decoded a chunk of K at a time into the first-level cache;
// for many, all of K once for all rows. Both give what the decoded matrix gives as bfloat16.
#include "block_formats.h"
#include "linear.h"
#include "tables.h"
#include "tiles.h"

namespace vivace::VIVACE_ISA {

extern const BlockKernels block_kernels;

namespace {

constexpr int kChunkSteps = 32, kChunk = kChunkSteps * kStepInputs;  // weights decoded at once

// ---------------------------------------------------------------- scales

template <class T>
VIVACE_INLINE T read_as(const uint8_t* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

VIVACE_INLINE float half_to_float(uint16_t half) {
#if VIVACE_LEVEL > 0
  return _cvtsh_ss(half);
#else
  return f16_to_float(half);
#endif
}

// What codes of e4m3 mean.
struct E4m3Values {
  float at[256];
};
constexpr E4m3Values kE4m3 = [] {
  E4m3Values values{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    float size = static_cast<float>(exponent == 0 ? mantissa : mantissa + 8) / 512.0f;
    for (int i = 1; i < exponent; ++i) size *= 2.0f;
    if ((code & 0x7f) == 0x7f) size = __builtin_nanf("");
    values.at[code] = code < 0x80 ? size : -size;
  }
  return values;
}();

// Steps of a row, or of several that lie `row_bytes` apart.
struct Source {
  const float* values;   // of the table
  const float* scales;   // one block's after the other's; those of rows are kRowScales apart
  const uint8_t* codes;  // of the first step
  size_t block_bytes;    // from one block's codes to the next one's
  size_t row_bytes;
};
constexpr int kRowScales = 2 * kChunkSteps;

// Scales of `count` blocks from `p` on, `stride` bytes apart; `row` is where the row begins.
using ReadScales = void (*)(const uint8_t* row, const uint8_t* p, size_t stride, int count,
                            float* scales);

template <int kScales, int kBytes, class Read>
VIVACE_INLINE void read_each(const uint8_t* p, size_t stride, int count, float* scales, Read read) {
  for (int i = 0; i < count; ++i, p += stride, scales += kScales) {
    scales[0] = read(p);
    if constexpr (kScales == 2) scales[1] = read(p + kBytes);
  }
}

template <TableScale kType, int kScales>
void read_scales(const uint8_t* row, const uint8_t* p, size_t stride, int count, float* scales) {
  if constexpr (kType == TableScale::float32)
    read_each<kScales, 4>(p, stride, count, scales, read_as<float>);
  if constexpr (kType == TableScale::float16)
    read_each<kScales, 2>(p, stride, count, scales,
                          [](const uint8_t* at) { return half_to_float(read_as<uint16_t>(at)); });
  if constexpr (kType == TableScale::bfloat16)
    read_each<kScales, 2>(p, stride, count, scales,
                          [](const uint8_t* at) { return bf16_to_float(read_as<uint16_t>(at)); });
  if constexpr (kType == TableScale::e8m0)
    read_each<kScales, 1>(p, stride, count, scales, [](const uint8_t* at) {
      return float_of(static_cast<uint32_t>(*at) << 23);
    });
  if constexpr (kType == TableScale::e4m3) {
    const float factor = read_as<float>(row);
    read_each<kScales, 1>(p, stride, count, scales,
                          [=](const uint8_t* at) { return kE4m3.at[*at] * factor; });
  }
  if constexpr (kType == TableScale::none)
    read_each<kScales, 0>(p, stride, count, scales, [](const uint8_t*) { return 1.0f; });
}

template <int kScales>
ReadScales choose_scales(TableScale type) {
  switch (type) {
    case TableScale::float32:
      return read_scales<TableScale::float32, kScales>;
    case TableScale::float16:
      return read_scales<TableScale::float16, kScales>;
    case TableScale::bfloat16:
      return read_scales<TableScale::bfloat16, kScales>;
    case TableScale::e8m0:
      return read_scales<TableScale::e8m0, kScales>;
    case TableScale::e4m3:
      return read_scales<TableScale::e4m3, kScales>;
    default:
      return read_scales<TableScale::none, kScales>;
  }
}

// ---------------------------------------------------------------- decoding

// A codec prepares a block of kSteps steps (0: all of a row) that share kScales scales, then
// decodes its steps.
template <int kBits, int kBlockSteps, bool kHalves, bool kIsSigned>
struct TableCodec {
  static constexpr int kStepBytes = 4 * kBits, kSteps = kBlockSteps;
  static constexpr int kScales = kHalves || kIsSigned ? 2 : 1;
  static constexpr int kVectors = Table<kBits>::kVectors;
  using Block = Table<kBits>;
  F32x16 values[kVectors];

  VIVACE_MEMBER explicit TableCodec(const float* from) {
    VIVACE_UNROLL
    for (int i = 0; i < kVectors; ++i) values[i] = load(from + 16 * i);
  }

  VIVACE_MEMBER Block block(const float* scales) const {
    const F32x16 scale = set1(scales[0]);
    F32x16 first[kVectors], second[kVectors];
    VIVACE_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      if constexpr (kIsSigned)
        first[i] = mul(values[i], select(less(values[i], zero()), set1(scales[1]), scale));
      else
        first[i] = mul(values[i], scale);
      if constexpr (kHalves) second[i] = mul(values[i], set1(scales[1]));
    }
    return make_table<kBits>(first, kHalves ? second : first);
  }

  VIVACE_MEMBER Pairs step(const uint8_t* codes, const Block& table) const {
    return look_up<kBits, kHalves>(table, load_codes<kBits>(codes));
  }
};

template <bool kIsE4m3, int kBlockSteps>
struct ByteCodec {
  static constexpr int kStepBytes = 32, kSteps = kBlockSteps, kScales = 1;
  using Block = float;

  VIVACE_MEMBER explicit ByteCodec(const float*) {}
  VIVACE_MEMBER Block block(const float* scales) const { return scales[0]; }
  VIVACE_MEMBER Pairs step(const uint8_t* codes, Block scale) const {
    return widen_bytes<kIsE4m3>(codes, scale);
  }
};

template <class Codec>
void decode_steps(const Source& source, int steps, uint16_t* out) {
  constexpr int kStepBytes = Codec::kStepBytes, kSteps = Codec::kSteps;
  const Codec codec(source.values);
  const uint8_t* codes = source.codes;
  if constexpr (kSteps == 0) {
    const auto block = codec.block(source.scales);
    for (int i = 0; i < steps; ++i)
      store_pairs(out + 32 * i, codec.step(codes + kStepBytes * i, block));
  } else {
    const float* scales = source.scales;
    for (int i = 0; i < steps; i += kSteps, codes += source.block_bytes, scales += Codec::kScales) {
      const auto block = codec.block(scales);
      VIVACE_UNROLL
      for (int j = 0; j < kSteps; ++j)
        store_pairs(out + 32 * (i + j), codec.step(codes + kStepBytes * j, block));
    }
  }
}

// Takes steps of one row of x and kWideOutputs rows, whose weights stay in registers.
using OneSums = Sums<1, kWideOutputs>;
template <class Codec>
void multiply_steps(const Source& source, int steps, const uint16_t* x, OneSums& total) {
  constexpr bool kIsRow = Codec::kSteps == 0;
  constexpr int kStepBytes = Codec::kStepBytes, kSteps = kIsRow ? 1 : Codec::kSteps;
  const Codec codec(source.values);
  const size_t row_bytes = source.row_bytes, stride = kIsRow ? kStepBytes : source.block_bytes;
  const uint8_t* codes = source.codes;
  const float* scales = source.scales;
  OneSums sums = total;
  typename Codec::Block blocks[kWideOutputs];
  if constexpr (kIsRow)
    for (int n = 0; n < kWideOutputs; ++n) blocks[n] = codec.block(scales + n * kRowScales);
  for (int i = 0; i < steps; i += kSteps, codes += stride, scales += Codec::kScales) {
    VIVACE_UNROLL
    for (int n = 0; n < kWideOutputs; ++n) {
      if constexpr (!kIsRow) blocks[n] = codec.block(scales + n * kRowScales);
      const uint8_t* at = codes + static_cast<size_t>(n) * row_bytes;
      VIVACE_UNROLL
      for (int j = 0; j < kSteps; ++j)
        sums.at[0][n] = dot_bf16(sums.at[0][n], load_pairs(x + 32 * (i + j)),
                                 codec.step(at + kStepBytes * j, blocks[n]));
    }
  }
  total = sums;
}

struct StepKernels {
  void (*decode)(const Source& source, int steps, uint16_t* out);
  void (*multiply)(const Source& source, int steps, const uint16_t* x, OneSums& total);
};
constexpr bool kHasMultiplySteps = VIVACE_LEVEL >= 2;  // else there are too few registers
template <class Codec>
constexpr StepKernels kStepKernels = [] {
  if constexpr (kHasMultiplySteps) return StepKernels{decode_steps<Codec>, multiply_steps<Codec>};
  return StepKernels{decode_steps<Codec>, nullptr};
}();

template <int kBits, int kBlockSteps>
StepKernels choose_codes(const Format& format) {
  if constexpr (kBits < 6 && kBlockSteps == 1)
    if (format.group == 16) return kStepKernels<TableCodec<kBits, 1, true, false>>;
  if (format.is_signed) return kStepKernels<TableCodec<kBits, kBlockSteps, false, true>>;
  return kStepKernels<TableCodec<kBits, kBlockSteps, false, false>>;
}

template <int kBlockSteps>
StepKernels choose_steps(const Format& format) {
  if (format.bits == 3) return choose_codes<3, kBlockSteps>(format);
  if (format.bits == 4) return choose_codes<4, kBlockSteps>(format);
  if (format.bits == 6) return choose_codes<6, kBlockSteps>(format);
  if (format.table == TableKind::e4m3) return kStepKernels<ByteCodec<true, kBlockSteps>>;
  return kStepKernels<ByteCodec<false, kBlockSteps>>;
}

StepKernels choose_kernels(const Format& format) {
  if (format.group == 0) return choose_steps<0>(format);
  if (format.group <= 32) return choose_steps<1>(format);
  return format.group == 64 ? choose_steps<2>(format) : choose_steps<4>(format);
}

// Puts the weights that a row stores beside its codes where they belong: columns [first, last).
void place_outliers(const uint8_t* outliers, int count, int first, int last, uint16_t* out) {
  const uint8_t* values = outliers + 2 * static_cast<size_t>(count);
  for (int i = 0; i < count; ++i) {
    const int column = read_as<uint16_t>(outliers + 2 * i);
    if (column >= last) return;
    if (column >= first) out[column - first] = read_as<uint16_t>(values + 2 * i);
  }
}

// A row of some format and its weights [first, first + kChunk) as bfloat16.
class RowDecoder {
 public:
  RowDecoder(const Format& format, int K) : format_(format), K_(K) {
    if (format.storage == Storage::blocks) {
      layout_.bytes = static_cast<size_t>(K / block().weights) * block().bytes;
      chunk_bytes_ = static_cast<size_t>(kChunk / block().weights) * block().bytes;
      return;
    }
    layout_ = table_layout(format, K);
    is_row_ = format.group == 0;
    chunk_bytes_ = is_row_ ? static_cast<size_t>(kChunk / 8 * format.bits)
                           : kChunkSteps / layout_.block_steps * layout_.block_bytes;
    read_scales_ = layout_.block_scales == 1 ? choose_scales<1>(format.table_scale)
                                             : choose_scales<2>(format.table_scale);
    steps_ = choose_kernels(format);
  }

  size_t row_bytes() const { return layout_.bytes; }

  // Bytes of a chunk.
  size_t chunk_bytes() const { return chunk_bytes_; }

  // How many weights there are from `first` on, at most kChunk, in whole steps.
  int count(int first) const {
    const int left = (K_ - first + kStepInputs - 1) & -kStepInputs;
    return left < kChunk ? left : kChunk;
  }

  // Whether no code of a row is a NaN of its own, which decode() does not make one of.
  bool has_finite_codes(const uint8_t* row) const {
    if (format_.storage != Storage::table || format_.table != TableKind::e4m3) return true;
    bool finite = true;
    const uint8_t* block = row + layout_.blocks_at;
    for (; block < row + layout_.outliers_at; block += layout_.block_bytes)
      for (size_t i = layout_.codes_in_block; i < layout_.block_bytes; ++i)
        finite &= (block[i] & 0x7f) != 0x7f;
    return finite;
  }

  // Whether multiply_chunk() can be used: nothing but codes in whole steps.
  bool multiplies() const {
    return kHasMultiplySteps && format_.storage == Storage::table &&
           format_.table != TableKind::per_row && K_ % kStepInputs == 0;
  }

  // Takes count(first) weights of kWideOutputs rows.
  void multiply_chunk(const uint8_t* row, int first, const uint16_t* x, OneSums& sums) const {
    const int steps = count(first) / kStepInputs;
    float scales[kWideOutputs * kRowScales];
    for (int n = 0; n < kWideOutputs; ++n)
      read_chunk_scales(row + static_cast<size_t>(n) * layout_.bytes, first, steps,
                        scales + n * kRowScales);
    steps_.multiply(source(row, first, format_.values, scales), steps, x + first, sums);
  }

  // Decodes count(first) weights; those past the end of the row are zero.
  void decode(const uint8_t* row, int first, uint16_t* out) const {
    if (format_.storage == Storage::blocks) {
      const uint8_t* at = row + static_cast<size_t>(first / kChunk) * chunk_bytes_;
      block().decode(at, count(first) / block().weights, DecodedType::bfloat16, out);
      return;
    }
    decode_chunk(row, first, out);
    const int last = first + count(first);
    if (format_.num_outliers > 0)
      place_outliers(row + layout_.outliers_at, format_.num_outliers, first, last, out);
    for (int k = K_; k < last; ++k) out[k - first] = 0;
  }

 private:
  const BlockFormat& block() const { return block_kernels.formats[format_.block]; }

  const uint8_t* chunk_at(const uint8_t* row, int first) const {
    return row + layout_.blocks_at + static_cast<size_t>(first / kChunk) * chunk_bytes_;
  }

  void read_chunk_scales(const uint8_t* row, int first, int steps, float* scales) const {
    const uint8_t* at = is_row_ ? row + layout_.blocks_at : chunk_at(row, first);
    read_scales_(row, at, layout_.block_bytes, is_row_ ? 1 : steps / layout_.block_steps, scales);
  }

  Source source(const uint8_t* row, int first, const float* values, const float* scales) const {
    const uint8_t* codes = chunk_at(row, first) + layout_.codes_in_block;
    return {values, scales, codes, layout_.block_bytes, layout_.bytes};
  }

  void decode_chunk(const uint8_t* row, int first, uint16_t* out) const {
    const int steps = count(first) / kStepInputs;
    float scales[kRowScales], own[16];
    read_chunk_scales(row, first, steps, scales);
    if (format_.table == TableKind::per_row)
      for (int i = 0; i < 16; ++i)
        own[i] = i < 1 << format_.bits ? bf16_to_float(read_as<uint16_t>(row + 2 * i)) : 0.0f;
    const float* values = format_.table == TableKind::per_row ? own : format_.values;
    steps_.decode(source(row, first, values, scales), steps, out);
  }

  const Format& format_;
  const int K_;
  TableLayout layout_{};
  bool is_row_ = false;  // one scale a row
  size_t chunk_bytes_ = 0;
  ReadScales read_scales_ = nullptr;
  StepKernels steps_{};
};

// ---------------------------------------------------------------- products

VIVACE_INLINE void prefetch(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

Ahead no_ahead() {
  return {nullptr, 0, 1, INT32_MAX};
}

// Outputs [n, n + kWideOutputs) for one row; `next` is where the following tile begins, or null.
void multiply_one(const RowDecoder& decoder, const LinearItem& item, int n, const uint8_t* next) {
  const size_t stride = decoder.row_bytes();
  const auto* w = static_cast<const uint8_t*>(item.weight) + static_cast<size_t>(n) * stride;
  OneSums sums;
  clear(sums);
  for (int k = 0; k < item.K; k += kChunk) {
    const bool is_last = k + kChunk >= item.K;
    const uint8_t* following = is_last ? next : w + (k / kChunk + 1) * decoder.chunk_bytes();
    for (int i = 0; i < kWideOutputs && following != nullptr; ++i)
      prefetch(following + static_cast<size_t>(i) * stride, decoder.chunk_bytes());
    decoder.multiply_chunk(w, k, static_cast<const uint16_t*>(item.x), sums);
  }
  finish(sums, item.bias == nullptr ? nullptr : item.bias + n, item.y + n, item.ldy);
}

// Outputs [n, n + NR) for MR rows; `next` is where the following tile begins, or null.
template <int MR, int NR>
void multiply_few(const RowDecoder& decoder, const LinearItem& item, int n, const uint8_t* next) {
  alignas(64) uint16_t decoded[NR][kChunk + 32];
  const size_t stride = decoder.row_bytes();
  const auto* w = static_cast<const uint8_t*>(item.weight) + static_cast<size_t>(n) * stride;
  const char* x = static_cast<const char*>(item.x);
  Sums<MR, NR> sums;
  clear(sums);
  Ahead ahead = no_ahead();
  for (int k = 0; k < item.K; k += kChunk) {
    const bool is_last = k + kChunk >= item.K;
    const uint8_t* following = is_last ? next : w + (k / kChunk + 1) * decoder.chunk_bytes();
    for (int i = 0; i < NR; ++i) {
      if (following != nullptr)
        prefetch(following + static_cast<size_t>(i) * stride, decoder.chunk_bytes());
      decoder.decode(w + static_cast<size_t>(i) * stride, k, decoded[i]);
    }
    accumulate<Bfloat16>(sums, decoder.count(k), decoded[0], kChunk + 32,
                         x + static_cast<size_t>(k) * 2, item.x_stride, ahead);
  }
  finish(sums, item.bias == nullptr ? nullptr : item.bias + n, item.y + n, item.ldy);
}

template <int NR>
void multiply_many(const RowDecoder& decoder, const LinearItem& item, int n, const uint8_t* next) {
  const size_t row_bytes = decoder.row_bytes(), stride = decoded_stride(item.K);
  auto* decoded = reinterpret_cast<uint16_t*>(item.scratch);
  const auto* w = static_cast<const uint8_t*>(item.weight) + static_cast<size_t>(n) * row_bytes;
  for (int i = 0; i < NR; ++i) {
    const size_t at = static_cast<size_t>(i) * row_bytes;
    if (next != nullptr) prefetch(next + at, row_bytes);
    for (int k = 0; k < item.K; k += kChunk) decoder.decode(w + at, k, decoded + i * stride + k);
  }
  const int padded = static_cast<int>(stride) - 32, tiles = (item.M + kRows - 1) / kRows;
  Ahead ahead = no_ahead();
  for (int m = 0, tile = 0; tile < tiles; ++tile) {
    const int count = (item.M - m) / (tiles - tile);  // even shares
    multiply_rows<Bfloat16, NR>(count, padded, decoded, stride,
                                static_cast<const char*>(item.x) + m * item.x_stride, item.x_stride,
                                item.bias == nullptr ? nullptr : item.bias + n,
                                item.y + m * item.ldy + n, item.ldy, ahead);
    m += count;
  }
}

template <int NR>
void multiply_outputs(const RowDecoder& decoder, const LinearItem& item, int n,
                      const uint8_t* next) {
  if (item.M > kRows) return multiply_many<NR>(decoder, item, n, next);
  if constexpr (NR == kWideOutputs)
    if (item.M == 1 && decoder.multiplies()) return multiply_one(decoder, item, n, next);
  if constexpr (kRows >= 4)
    if (item.M == 4) return multiply_few<4, NR>(decoder, item, n, next);
  if (item.M == 3) return multiply_few<3, NR>(decoder, item, n, next);
  if (item.M == 2) return multiply_few<2, NR>(decoder, item, n, next);
  multiply_few<1, NR>(decoder, item, n, next);
}

template <int NR>
int multiply_tiles(const RowDecoder& decoder, const LinearItem& item, int n) {
  const auto* w = static_cast<const uint8_t*>(item.weight);
  for (; n + NR <= item.rows; n += NR) {
    const bool is_last = n + 2 * NR > item.rows;
    multiply_outputs<NR>(decoder, item, n,
                         is_last ? static_cast<const uint8_t*>(item.next)
                                 : w + static_cast<size_t>(n + NR) * decoder.row_bytes());
  }
  return n;
}

void multiply(const Format& format, const LinearItem& item) {
  const RowDecoder decoder(format, item.K);
  int n = 0;
  if (item.M <= kWideRows) n = multiply_tiles<kWideOutputs>(decoder, item, n);
  if (item.M > kWideRows) n = multiply_tiles<kOutputs>(decoder, item, n);
  multiply_tiles<1>(decoder, item, n);
}

void read_row(const Format& format, int32_t K, const void* row, float factor, float* y) {
  const RowDecoder decoder(format, K);
  uint16_t decoded[kChunk];
  for (int k = 0; k < K; k += kChunk) {
    decoder.decode(static_cast<const uint8_t*>(row), k, decoded);
    for (int i = 0; i < kChunk && k + i < K; ++i) y[k + i] = factor * bf16_to_float(decoded[i]);
  }
}

bool is_finite(const Format& format, int32_t K, const void* row) {
  const RowDecoder decoder(format, K);
  uint16_t decoded[kChunk];
  bool finite = decoder.has_finite_codes(static_cast<const uint8_t*>(row));
  for (int k = 0; k < K; k += kChunk) {
    decoder.decode(static_cast<const uint8_t*>(row), k, decoded);
    for (int i = 0; i < kChunk && k + i < K; ++i) finite &= (decoded[i] & 0x7f80) != 0x7f80;
  }
  return finite;
}

}  // namespace

extern const TableKernels table_kernels;
const TableKernels table_kernels = {multiply, read_row, is_finite};

}  // namespace vivace::VIVACE_ISA
