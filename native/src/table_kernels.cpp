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

VIVACE_INLINE float e4m3_to_float(uint32_t code) {
  if ((code & 0x7f) == 0x7f) return __builtin_nanf("");
  return 256.0f * half_to_float(static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7));
}

// Scales of `blocks` blocks, as floats one after another.
template <class Read>
VIVACE_INLINE void read_scales(const TableLayout& layout, size_t bytes, const uint8_t* block,
                               int blocks, float* scales, Read read) {
  for (int i = 0; i < blocks; ++i, block += layout.block_bytes)
    for (int j = 0; j < layout.block_scales; ++j)
      *scales++ = read(block + static_cast<size_t>(j) * bytes);
}

void read_scales(TableScale type, const TableLayout& layout, const uint8_t* row,
                 const uint8_t* block, int blocks, float* scales) {
  switch (type) {
    case TableScale::float32:
      return read_scales(layout, 4, block, blocks, scales, read_as<float>);
    case TableScale::float16:
      return read_scales(layout, 2, block, blocks, scales,
                         [](const uint8_t* p) { return half_to_float(read_as<uint16_t>(p)); });
    case TableScale::bfloat16:
      return read_scales(layout, 2, block, blocks, scales,
                         [](const uint8_t* p) { return bf16_to_float(read_as<uint16_t>(p)); });
    case TableScale::e8m0:
      return read_scales(layout, 1, block, blocks, scales, [](const uint8_t* p) {
        return float_of(static_cast<uint32_t>(*p) << 23);
      });
    case TableScale::e4m3: {
      const float factor = read_as<float>(row);
      return read_scales(layout, 1, block, blocks, scales,
                         [&](const uint8_t* p) { return e4m3_to_float(*p) * factor; });
    }
    default:
      return read_scales(layout, 0, block, blocks, scales, [](const uint8_t*) { return 1.0f; });
  }
}

// ---------------------------------------------------------------- decoding

// Steps of one row from `step` of `block` on, whose scales begin at `scales`.
struct Source {
  const Format& format;
  const TableLayout& layout;
  const float* values;
  const float* scales;
  const uint8_t* block;
  int step;

  // f(codes, scales, out) for each step; g(scales) before those of a new block.
  template <int kStepBytes, class G, class F>
  VIVACE_MEMBER void for_steps(int steps, uint16_t* out, G g, F f) const {
    const uint8_t* at = block;
    const float* scale = scales;
    int in_block = step;
    while (steps > 0) {
      const auto table = g(scale);
      const uint8_t* codes = at + layout.codes_in_block + in_block * kStepBytes;
      const int left = layout.block_steps - in_block, count = left < steps ? left : steps;
      for (int i = 0; i < count; ++i, codes += kStepBytes, out += 32)
        store_pairs(out, f(codes, table));
      steps -= count;
      in_block = 0;
      at += layout.block_bytes;
      scale += layout.block_scales;
    }
  }
};

template <int kBits, bool kHalves, bool kIsSigned>
void decode_table(const Source& source, int steps, uint16_t* out) {
  constexpr int kVectors = Table<kBits>::kVectors;
  F32x16 values[kVectors];
  Mask16 is_negative[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    values[i] = load(source.values + 16 * i);
    is_negative[i] = less(values[i], zero());
  }
  source.for_steps<4 * kBits>(
      steps, out,
      [&](const float* scales) {
        const F32x16 scale = set1(scales[0]);
        F32x16 first[kVectors], second[kVectors];
        for (int i = 0; i < kVectors; ++i) {
          if constexpr (kIsSigned)
            first[i] = mul(values[i], select(is_negative[i], set1(scales[1]), scale));
          else
            first[i] = mul(values[i], scale);
          if constexpr (kHalves) second[i] = mul(values[i], set1(scales[1]));
        }
        return make_table<kBits>(first, kHalves ? second : first);
      },
      [](const uint8_t* codes, const Table<kBits>& table) {
        return look_up<kBits, kHalves>(table, load_codes<kBits>(codes));
      });
}

template <bool kIsE4m3>
void decode_bytes(const Source& source, int steps, uint16_t* out) {
  source.for_steps<32>(
      steps, out, [](const float* scales) { return scales[0]; },
      [](const uint8_t* codes, float scale) { return widen_bytes<kIsE4m3>(codes, scale); });
}

template <int kBits>
void decode_codes(const Source& source, int steps, uint16_t* out) {
  if constexpr (kBits < 6)
    if (source.format.group == 16) return decode_table<kBits, true, false>(source, steps, out);
  if (source.format.is_signed) return decode_table<kBits, false, true>(source, steps, out);
  decode_table<kBits, false, false>(source, steps, out);
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
    if (format.storage == Storage::table)
      layout_ = table_layout(format, K);
    else
      layout_.bytes = static_cast<size_t>(K) / block().weights * block().bytes;
  }

  size_t row_bytes() const { return layout_.bytes; }

  // About where the weights from `first` on lie in a row.
  size_t offset(int first) const {
    return static_cast<size_t>(first) * layout_.bytes / static_cast<size_t>(K_);
  }

  // How many weights there are from `first` on, at most kChunk, in whole steps.
  int count(int first) const {
    const int left = (K_ - first + kStepInputs - 1) / kStepInputs * kStepInputs;
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

  // Decodes count(first) weights; those past the end of the row are zero.
  void decode(const uint8_t* row, int first, uint16_t* out) const {
    if (format_.storage == Storage::blocks) {
      const uint8_t* at = row + first / block().weights * block().bytes;
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

  void decode_chunk(const uint8_t* row, int first, uint16_t* out) const {
    const int step = first / kStepInputs, steps = count(first) / kStepInputs;
    const int index = step / layout_.block_steps, in_block = step % layout_.block_steps;
    const int blocks = (in_block + steps + layout_.block_steps - 1) / layout_.block_steps;
    const uint8_t* at = row + layout_.blocks_at + index * layout_.block_bytes;
    float scales[2 * kChunkSteps];
    read_scales(format_.table_scale, layout_, row, at, blocks, scales);
    float own[16] = {};
    if (format_.table == TableKind::per_row)
      for (int i = 0; i < 1 << format_.bits; ++i)
        own[i] = bf16_to_float(read_as<uint16_t>(row + 2 * i));
    const float* values = format_.table == TableKind::per_row ? own : format_.values;
    const Source source{format_, layout_, values, scales, at, in_block};
    if (format_.bits == 3) return decode_codes<3>(source, steps, out);
    if (format_.bits == 4) return decode_codes<4>(source, steps, out);
    if (format_.bits == 6) return decode_codes<6>(source, steps, out);
    if (format_.table == TableKind::e4m3) return decode_bytes<true>(source, steps, out);
    decode_bytes<false>(source, steps, out);
  }

  const Format& format_;
  const int K_;
  TableLayout layout_{};
};

// ---------------------------------------------------------------- products

VIVACE_INLINE void prefetch(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

Ahead no_ahead() {
  return {nullptr, 0, 1, INT32_MAX};
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
    const uint8_t* following = is_last ? next : w + decoder.offset(k + kChunk);
    for (int i = 0; i < NR; ++i) {
      if (following != nullptr)
        prefetch(following + static_cast<size_t>(i) * stride, decoder.offset(kChunk));
      decoder.decode(w + static_cast<size_t>(i) * stride, k, decoded[i]);
    }
    accumulate<Bfloat16>(sums, decoder.count(k), decoded[0], kChunk + 32,
                         x + static_cast<size_t>(k) * 2, item.x_stride, ahead);
  }
  finish(sums, item.bias == nullptr ? nullptr : item.bias + n, item.y + n, item.ldy);
}

template <int NR>
void multiply_many(const RowDecoder& decoder, const LinearItem& item, int n, const uint8_t* next) {
  const size_t row_bytes = decoder.row_bytes(), stride = scratch_stride(item.K);
  const auto* w = static_cast<const uint8_t*>(item.weight) + static_cast<size_t>(n) * row_bytes;
  for (int i = 0; i < NR; ++i) {
    const size_t at = static_cast<size_t>(i) * row_bytes;
    if (next != nullptr) prefetch(next + at, row_bytes);
    for (int k = 0; k < item.K; k += kChunk)
      decoder.decode(w + at, k, item.scratch + i * stride + k);
  }
  const int padded = static_cast<int>(stride) - 32, tiles = (item.M + kRows - 1) / kRows;
  Ahead ahead = no_ahead();
  for (int m = 0, tile = 0; tile < tiles; ++tile) {
    const int count = (item.M - m) / (tiles - tile);  // even shares
    multiply_rows<Bfloat16, NR>(count, padded, item.scratch, stride,
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
