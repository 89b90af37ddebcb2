// Packing of weights, for loading and for `vivace quantize`.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "bindings.h"
#include "pack.h"

namespace vivace {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Panels = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Storage find_storage(const Weights& weights) {
  if (weights.dtype() == nb::dtype<float>()) return Storage::float32;
  if (weights.dtype() == nb::dtype<uint16_t>()) return Storage::bfloat16;
  const nb::dlpack::dtype float16 = {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
  require(weights.dtype() == float16,
          "weights are of another type: expected float32, float16 or uint16");
  return Storage::float16;
}

// Calls f(), which parses a name or lays out a matrix; what it refuses is a NativeError.
template <class F>
auto checked(F f) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    throw NativeError(error.what());
  }
}

size_t bytes_of(const std::string& kernel, int32_t rows, int32_t K) {
  require(rows > 0 && K > 0, "a matrix [" + std::to_string(rows) + ", " + std::to_string(K) +
                                 "]: expected sizes of 1 or more");
  return checked([&] { return matrix_bytes(format_from_name(kernel), rows, K); });
}

bool pack_codes(const std::string& kernel, const Weights& weights, const Panels& out,
                std::optional<int> threads, const std::optional<std::string>& isa) {
  constexpr size_t kMost = INT32_MAX;
  require(weights.shape(0) <= kMost && weights.shape(1) <= kMost,
          "a matrix has more than 2^31 - 1 rows or columns");
  const auto rows = static_cast<int32_t>(weights.shape(0));
  const auto K = static_cast<int32_t>(weights.shape(1));
  const size_t bytes = bytes_of(kernel, rows, K);
  const Format format = format_from_name(kernel);
  require(format.storage == Storage::codes,
          "weights are not packed as " + kernel + ": expected integer codes");
  require(out.size() == bytes,
          "out has " + std::to_string(out.size()) + " bytes: expected " + std::to_string(bytes));
  const CodesLayout layout = codes_layout(format, K);
  const Storage storage = find_storage(weights);
  const size_t row_bytes = static_cast<size_t>(K) * (storage == Storage::float32 ? 4 : 2);
  const Kernels& kernels = find_kernels(isa);
  const std::shared_ptr<Pool> pool = shared_pool(threads);
  const auto* data = static_cast<const uint8_t*>(weights.data());
  std::atomic<bool> fits = true;
  const nb::gil_scoped_release release;
  const auto num_units = static_cast<int64_t>(bytes / layout.bytes);
  pool->parallel(num_units * kPanels, [&](int64_t index, int) {
    const FloatEnvironment environment(Denormals::kept);
    const auto first = static_cast<int32_t>(index * kPanelOutputs);
    // A panel that fills up the last unit has no rows.
    const PackItem item = {storage,
                           data + static_cast<size_t>(std::min(first, rows)) * row_bytes,
                           std::clamp(rows - first, 0, kPanelOutputs),
                           K,
                           out.data() + static_cast<size_t>(index / kPanels) * layout.bytes,
                           static_cast<int>(index % kPanels)};
    if (!kernels.pack->pack_panel(format, layout, item)) fits = false;
  });
  return fits;
}

bool is_finite_matrix(nb::handle packed, std::optional<int> threads) {
  const PackedMatrix matrix = bind_packed(packed);
  const std::shared_ptr<Pool> pool = shared_pool(threads);
  const nb::gil_scoped_release release;
  return is_finite(select_kernels(), *pool, matrix);
}

uint64_t checksum_of(const Bytes& data, std::optional<int> threads) {
  const std::shared_ptr<Pool> pool = shared_pool(threads);
  const nb::gil_scoped_release release;
  return checksum(*pool, data.data(), data.size());
}

}  // namespace

void bind_pack(nb::module_& m) {
  m.def("matrix_bytes", &bytes_of, nb::arg("kernel"), nb::arg("num_rows"), nb::arg("num_columns"));
  m.def("pack_codes", &pack_codes, nb::arg("kernel"), nb::arg("weights").noconvert(),
        nb::arg("out").noconvert(), nb::arg("threads").none() = nb::none(),
        nb::arg("isa").none() = nb::none());
  m.def("is_finite", &is_finite_matrix, nb::arg("packed"), nb::arg("threads").none() = nb::none());
  m.def("checksum", &checksum_of, nb::arg("data").noconvert(),
        nb::arg("threads").none() = nb::none());
}

}  // namespace vivace
