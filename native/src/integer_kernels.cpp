// Linear layers of whole numbers: codes of weights times inputs rounded to 8 bits.
//
// Lanes are outputs. Inside a group of inputs the sum is exact in 32 bits; then one multiply-add
// per group, in order of K, joins the output's float32 sum. So an output's bits depend on K and the
// format alone, whatever the rows of a tile and the instruction set. Codes are unpacked once for
// all rows of a tile. Whole units have tiles of their own (integer_tiles.h).
#include "integer_tiles.h"
#include "linear.h"

namespace vivace::VIVACE_ISA {
namespace {

// Rows that share unpacked codes, by the registers there are.
constexpr int kTileRows = VIVACE_LEVEL >= 2 ? 8 : 4;
// So many rows meet all panels of a unit at once, in the order in which memory has them.
constexpr int kWideRows = VIVACE_LEVEL == 1 ? 3 : 4;
// Up to kChunkRows rows meet so much of a unit at a time: it stays in the first-level cache while
// what follows comes into the second.
constexpr size_t kChunkBytes = 16 << 10;
constexpr int kChunkRows = 32;
constexpr bool kPrefersUnits = VIVACE_LEVEL != 2;  // for many rows too, to large tiles of a panel

// ---------------------------------------------------------------- tiles

constexpr int kUnpackTiles = 3;  // of rows, from which on blocks are taken apart once

// T rows of inputs times a panel.
template <class Source, int T>
[[gnu::noinline]] void multiply_tile(Source source, const Tile& tile) {
  F32x16 acc[T];
  VIVACE_UNROLL
  for (int r = 0; r < T; ++r) acc[r] = zero();
  TileRows rows(tile);
  const int num_steps = (tile.K + kStepInputs - 1) / kStepInputs;
  Ahead ahead = tile.ahead;
  const auto begin = [&](int step) {
    rows.template forget<T>();
    ahead.advance();
    source.begin(step);
  };
  const auto start = [&](I32x16* sums, int group) {
    VIVACE_UNROLL
    for (int r = 0; r < T; ++r)
      sums[r] = source.start(group, set1_i32(rows.scale(r, group).offset));
  };
  const auto join = [&](const I32x16* sums, int group) {
    const F32x16 scale = source.scale(group);
    [[maybe_unused]] const F32x16 minimum = source.minimum(group);
    VIVACE_UNROLL
    for (int r = 0; r < T; ++r) {
      acc[r] = fma(to_float(sums[r]), mul(scale, set1(rows.scale(r, group).scale)), acc[r]);
      if constexpr (Source::kHasMinimum)
        acc[r] = fma(minimum, set1(rows.product(r, group)), acc[r]);
    }
  };
  const auto multiply = [&]<int kFrom, int kCount>(I32x16* sums, int step) {
    dot<T, kCount, Source::kMaxCode>(
        sums, [&](int j) { return source.code(kFrom + j); },
        [&](int r) { return rows.input(r, step) + 4 * kFrom; });
  };
  const int steps_per_group = tile.input_group / kStepInputs;
  I32x16 sums[T];
  if constexpr (Source::kGroup == 16) {
    for (int step = 0; step < num_steps; ++step) {
      begin(step);
      start(sums, 2 * step);
      multiply.template operator()<0, 4>(sums, step);
      join(sums, 2 * step);
      start(sums, 2 * step + 1);
      multiply.template operator()<4, 4>(sums, step);
      join(sums, 2 * step + 1);
    }
  } else if (Source::kGroup == 32 || steps_per_group == 1) {
    for (int step = 0; step < num_steps; ++step) {
      begin(step);
      start(sums, step);
      multiply.template operator()<0, 8>(sums, step);
      join(sums, step);
    }
  } else {
    for (int step = 0, group = 0; step < num_steps; ++group) {
      start(sums, group);
      const int end = step + steps_per_group < num_steps ? step + steps_per_group : num_steps;
      for (; step < end; ++step) {
        begin(step);
        multiply.template operator()<0, 8>(sums, step);
      }
      join(sums, group);
    }
  }
  const F32x16 row_scale = source.row_scale();
  const int outputs = tile.outputs < kPanelOutputs ? tile.outputs : kPanelOutputs;
  const F32x16 bias = tile.bias == nullptr ? zero() : load_first(tile.bias, outputs);
  VIVACE_UNROLL
  for (int r = 0; r < T; ++r) {
    F32x16 out = mul(acc[r], row_scale);
    if (tile.bias != nullptr) out = add(out, bias);
    float* y = tile.y + r * tile.ldy;
    if (outputs == kPanelOutputs)
      store(y, out);
    else
      store_first(y, out, outputs);
  }
}

template <class Source>
void multiply_rows(int T, const Source& source, const Tile& tile) {
  switch (T) {
#if VIVACE_LEVEL >= 2
    case 8:
      return multiply_tile<Source, 8>(source, tile);
    case 7:
      return multiply_tile<Source, 7>(source, tile);
    case 6:
      return multiply_tile<Source, 6>(source, tile);
    case 5:
      return multiply_tile<Source, 5>(source, tile);
#endif
    case 4:
      return multiply_tile<Source, 4>(source, tile);
    case 3:
      return multiply_tile<Source, 3>(source, tile);
    case 2:
      return multiply_tile<Source, 2>(source, tile);
    default:
      return multiply_tile<Source, 1>(source, tile);
  }
}

// Up to kWideRows rows times a unit of codes.
template <int kBits>
void multiply_wide(int T, const Format& format, const void* unit, const Tile& tile) {
  switch (T) {
#if VIVACE_LEVEL != 1
    case 4:
      return multiply_unit<kBits, 4>(format, unit, tile);
#endif
    case 3:
      return multiply_unit<kBits, 3>(format, unit, tile);
    case 2:
      return multiply_unit<kBits, 2>(format, unit, tile);
    default:
      return multiply_unit<kBits, 1>(format, unit, tile);
  }
}

int shares_of(int rows, int most) {
  return (rows + most - 1) / most;
}

// Calls f(first, count) for each of a number of even shares of rows, the larger ones first.
template <class F>
void for_shares(int rows, int num_shares, F f) {
  for (int first = 0, i = 0; i < num_shares; ++i) {
    const int count = shares_of(rows - first, num_shares - i);
    f(first, count);
    first += count;
  }
}

// What `of` is from a row on.
Tile from_row(const Tile& of, int row) {
  Tile tile = of;
  tile.x += static_cast<size_t>(row) * tile.x_stride;
  tile.y += row * tile.ldy;
  return tile;
}

// All rows times a unit of codes; `following` is the next one, or null.
template <int kBits>
void multiply_unit_rows(const Format& format, int rows, const char* unit, size_t bytes,
                        const char* following, const Tile& unit_tile) {
  alignas(64) float partial[kChunkRows][kPanels * kPanelOutputs];
  const int tiles = shares_of(rows, kWideRows);
  const int num_steps = (unit_tile.K + kStepInputs - 1) / kStepInputs;
  const int group_steps = unit_tile.input_group / kStepInputs;
  const size_t step_bytes = bytes / static_cast<size_t>(num_steps);
  const int groups = static_cast<int>(kChunkBytes / step_bytes) / group_steps;
  const bool is_whole = tiles == 1 || rows > kChunkRows;
  const int chunk = is_whole ? num_steps : (groups > 0 ? groups : 1) * group_steps;
  // A single tile is followed by memory's prefetchers, unless its arithmetic holds them up.
  const int bringing = tiles >= kBringing<kBits> ? kBringing<kBits> : 0;
  for (int step = 0; step < num_steps; step += chunk) {
    const int to_step = step + chunk < num_steps ? step + chunk : num_steps;
    const char* next = tiles == 1            ? unit + kChunkBytes
                       : to_step < num_steps ? unit + static_cast<size_t>(to_step) * step_bytes
                                             : following;
    const size_t share = static_cast<size_t>(to_step - step) * step_bytes / kBringing<kBits>;
    int i = 0;
    for_shares(rows, tiles, [&](int first, int count) {
      Tile tile = from_row(unit_tile, first);
      tile.from_step = step;
      tile.to_step = to_step;
      tile.partial = is_whole ? nullptr : partial[first];
      if (i < bringing && next != nullptr) tile.bring = next + static_cast<size_t>(i) * share;
      multiply_wide<kBits>(count, format, unit, tile);
      ++i;
    });
  }
}

template <class Source>
void multiply_as(const Format& format, const LinearItem& item) {
  const size_t unit = unit_bytes(format, item.K);
  const int tiles = shares_of(item.M, kTileRows);
  const auto* weight = static_cast<const char*>(item.weight);
  Tile tile = {};
  tile.K = item.K;
  tile.input_group = format.input.group;
  tile.input = int8_layout(format.input, item.K);
  tile.x = static_cast<const char*>(item.x);
  tile.x_stride = item.x_stride;
  tile.ldy = item.ldy;
  const size_t steps = (static_cast<size_t>(item.K) + kStepInputs - 1) / kStepInputs;
  constexpr int kUnitOutputs = Source::kUnitPanels * kPanelOutputs;
  const auto unit_of = [&](int n) { return weight + static_cast<size_t>(n / kUnitOutputs) * unit; };
  const auto unit_after = [&](int n) {
    const int after = (n / kUnitOutputs + 1) * kUnitOutputs;
    return after < item.rows ? unit_of(after) : static_cast<const char*>(item.next);
  };
  const auto aim = [&](int n) {
    tile.outputs = item.rows - n;
    tile.bias = item.bias == nullptr ? nullptr : item.bias + n;
    tile.y = item.y + n;
  };
  int n = 0;
  if constexpr (Source::kGroup == 0) {
    if (item.M <= kWideRows || kPrefersUnits) {
      for (; n + kUnitOutputs <= item.rows; n += kUnitOutputs) {
        aim(n);
        multiply_unit_rows<Source::kBits>(format, item.M, unit_of(n), unit, unit_after(n), tile);
      }
    }
  }
  for (; n < item.rows; n += kPanelOutputs) {
    const Source source(format, item.K, unit_of(n), n % kUnitOutputs / kPanelOutputs);
    aim(n);
    // While a panel is read, its share of the unit after it is brought.
    const char* next = unit_after(n);
    const size_t share = unit / Source::kUnitPanels;
    const size_t from = static_cast<size_t>(n % kUnitOutputs / kPanelOutputs) * share;
    tile.ahead = {next, from, from, next == nullptr ? 0 : share / steps};
    const auto multiply = [&](const auto& from) {
      for_shares(item.M, tiles, [&](int first, int count) {
        multiply_rows(count, from, from_row(tile, first));
        tile.ahead.per_step = 0;
      });
    };
    if constexpr (Source::kGroup != 0) {
      if (tiles >= kUnpackTiles) {
        multiply(Unpacked<Source>(source, item.K, item.scratch));
        continue;
      }
    }
    multiply(source);
  }
}

void multiply(const Format& format, const LinearItem& item) {
  with_source(format, [&]<class Source>() { multiply_as<Source>(format, item); });
}

// ---------------------------------------------------------------- inputs

// Inputs below this magnitude count as zero: 127 divided by them could overflow.
constexpr uint32_t kTinyBits = 0x0d800000;  // 2^-100

void prepare(const InputFormat& format, int32_t K, int32_t from, int32_t to, const float* row,
             void* out) {
  const Int8Layout layout = int8_layout(format, K);
  auto* codes = static_cast<int8_t*>(out);
  auto* scales = reinterpret_cast<InputScale*>(codes + layout.scales_at);
  auto* products = reinterpret_cast<float*>(codes + layout.products_at);
  const int num_vectors = format.group / 16;
  // The last range has the padding too.
  const int32_t end = to == K ? layout.num_groups : to / format.group;
  for (int32_t group = from / format.group; group < end; ++group) {
    const int32_t first = group * format.group;
    const auto vector = [&](int i) {
      const int32_t k = first + 16 * i;
      const float* x = row + (k - from);
      return k + 16 <= K ? load(x) : k < K ? load_first(x, K - k) : zero();
    };
    I32x16 most = set1_i32(0);
    for (int i = 0; i < num_vectors; ++i) most = max_magnitude(most, vector(i));
    const auto bits = static_cast<uint32_t>(reduce_max_i32(most));
    const float size = float_of(bits);
    const bool is_usual = bits >= kTinyBits && bits < 0x7f800000u;
    const F32x16 inverse = set1(is_usual ? 127.0f / size : 0.0f);
    I32x16 sum = set1_i32(0);
    for (int i = 0; i < num_vectors; ++i) {
      const I32x16 whole = is_usual ? round_to_i32(mul(vector(i), inverse)) : set1_i32(0);
      store_low_bytes(codes + first + 16 * i, whole);
      sum = add_i32(sum, whole);
    }
    // What is not finite stays so: as a scale it spoils every output.
    const float scale = is_usual ? size / 127.0f : bits < kTinyBits ? 0.0f : size;
    const int32_t minus = -reduce_add_i32(sum);
    scales[group] = {scale, minus * format.zero};
    products[group] = scale * static_cast<float>(minus);
  }
}

// ---------------------------------------------------------------- rows of a matrix

template <class Source>
void read_row(const Format& format, int32_t K, const void* unit, int output, float factor,
              float* y) {
  Source source(format, K, unit, output / kPanelOutputs);
  output %= kPanelOutputs;
  const float row_scale = [&] {
    float lanes[16];
    store(lanes, source.row_scale());
    return lanes[output];
  }();
  for (int32_t k = 0; k < K; k += 16) {
    uint8_t bytes[4][64];
    const int step = k / kStepInputs, first = k % kStepInputs / 4;
    if (first == 0) source.begin(step);
    for (int j = 0; j < 4; ++j) store_bytes(bytes[j], source.code(first + j));
    const int group = Source::kGroup != 0 ? k / Source::kGroup
                      : format.group != 0 ? k / format.group
                                          : 0;
    float scales[16], minimums[16];
    int32_t offsets[16];
    store(scales, source.scale(group));
    store(minimums, source.minimum(group));
    const I32x16 start = source.start(group, set1_i32(-format.input.zero));
    __builtin_memcpy(offsets, &start, 64);
    const float scale = scales[output] * row_scale;
    for (int i = 0; i < 16 && k + i < K; ++i) {
      const int code = bytes[i / 4][4 * output + i % 4] + offsets[output];
      float value = static_cast<float>(code) * scale;
      if constexpr (Source::kHasMinimum) value = value - minimums[output];
      y[k + i] = factor * value;
    }
  }
}

void read(const Format& format, int32_t K, const void* unit, int output, float factor, float* y) {
  with_source(format,
              [&]<class Source>() { read_row<Source>(format, K, unit, output, factor, y); });
}

// ---------------------------------------------------------------- what the machine can do at most

double peak(int64_t rounds) {
  constexpr int kChains = VIVACE_LEVEL >= 3 ? 24 : VIVACE_LEVEL == 2 ? 8 : 4;
  uint8_t raw[64];
  int8_t inputs[kChains][32];
  for (int i = 0; i < 64; ++i) raw[i] = 3;
  for (auto& row : inputs)
    for (int8_t& input : row) input = 1;
  const Bytes64 codes = load_bytes(raw);
  I32x16 sums[kChains];
  VIVACE_UNROLL
  for (int i = 0; i < kChains; ++i) sums[i] = set1_i32(i);
  for (int64_t round = 0; round < rounds; ++round) {
    // Chains have inputs of their own where equal products would be made once.
    __asm__ volatile("" : "+m"(inputs));
    dot<kChains, 8, 15>(
        sums, [&](int) { return codes; }, [&](int r) { return inputs[VIVACE_LEVEL >= 3 ? 0 : r]; });
  }
  int32_t total = 0;
  VIVACE_UNROLL
  for (int i = 0; i < kChains; ++i) total += reduce_add_i32(sums[i]);
  __asm__ volatile("" : : "m"(total));
  return static_cast<double>(rounds) * kChains * 8 * 128;
}

}  // namespace

extern const IntegerKernels integer_kernels;
const IntegerKernels integer_kernels = {prepare, multiply, read, peak};

}  // namespace vivace::VIVACE_ISA
