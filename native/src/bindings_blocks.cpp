// Decoding of quantized blocks, for loading.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "bindings.h"
#include "block_formats.h"

namespace vivace {

namespace {

constexpr int64_t kItemWeights = 1 << 16;  // decoded by one thread at a time

using Rows = Array<const uint8_t, 2>;
using Decoded = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

const BlockFormat& find_format(const Kernels& kernels, const std::string& name) {
  std::string known;
  for (int i = 0; i < kernels.blocks->num_formats; ++i) {
    const BlockFormat& format = kernels.blocks->formats[i];
    if (format.name == name) return format;
    known += (known.empty() ? "" : ", ") + std::string(format.name);
  }
  throw NativeError("there is no block format '" + name + "': expected one of " + known);
}

DecodedType find_type(const Decoded& out) {
  if (out.dtype() == nb::dtype<float>()) return DecodedType::float32;
  if (out.dtype() == nb::dtype<uint16_t>()) return DecodedType::bfloat16;
  const nb::dlpack::dtype float16 = {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
  require(out.dtype() == float16, "out is of another type: expected float32, float16 or uint16");
  return DecodedType::float16;
}

void decode_blocks(const std::string& name, const Rows& raw, const Decoded& out,
                   std::optional<int> threads, const std::optional<std::string>& isa) {
  const BlockFormat& format = find_format(find_kernels(isa), name);
  const DecodedType type = find_type(out);
  require(raw.shape(1) % format.bytes == 0,
          "a row has " + std::to_string(raw.shape(1)) + " bytes: expected a multiple of the " +
              std::to_string(format.bytes) + " of a block of " + name);
  const auto rows = static_cast<int64_t>(raw.shape(0));
  const auto row_blocks = static_cast<int64_t>(raw.shape(1) / format.bytes);
  require(static_cast<int64_t>(out.shape(0)) == rows &&
              static_cast<int64_t>(out.shape(1)) == row_blocks * format.weights,
          "out has the shape [" + std::to_string(out.shape(0)) + ", " +
              std::to_string(out.shape(1)) + "]: expected [" + std::to_string(rows) + ", " +
              std::to_string(row_blocks * format.weights) + "]");
  const size_t element = type == DecodedType::float32 ? sizeof(float) : sizeof(uint16_t);
  const int64_t num_blocks = rows * row_blocks;
  const int64_t item_blocks = kItemWeights / format.weights;
  const std::shared_ptr<Pool> pool = shared_pool(threads);
  const nb::gil_scoped_release release;
  pool->parallel((num_blocks + item_blocks - 1) / item_blocks, [&](int64_t item, int) {
    const int64_t first = item * item_blocks;
    format.decode(
        raw.data() + first * static_cast<int64_t>(format.bytes),
        std::min(item_blocks, num_blocks - first), type,
        static_cast<char*>(out.data()) + first * format.weights * static_cast<int64_t>(element));
  });
}

}  // namespace

void bind_blocks(nb::module_& m) {
  m.def("decode_blocks", &decode_blocks, nb::arg("format"), nb::arg("raw").noconvert(),
        nb::arg("out").noconvert(), nb::arg("threads").none() = nb::none(),
        nb::arg("isa").none() = nb::none());
}

}  // namespace vivace
