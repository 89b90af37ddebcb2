// What the binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "native_error.h"
#include "program.h"

namespace vivace {

namespace nb = nanobind;

template <class T, size_t N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T>
using In = Array<const T, 1>;
using Matrix = Array<const float, 2>;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw NativeError(message);
}

// A new array [shape] that owns its memory; its values are not set.
template <class T>
nb::ndarray<nb::numpy, T> new_array(std::initializer_list<size_t> shape) {
  size_t size = 1;
  for (size_t extent : shape) size *= extent;
  T* data = new T[size > 0 ? size : 1];
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T>(data, shape, owner);
}

// One pool per number of threads in a process: two that spin would take each other's cores.
std::shared_ptr<Pool> shared_pool(std::optional<int> threads);
const Kernels& find_kernels(const std::optional<std::string>& isa);
KVType find_kv_type(const std::string& name);
Activation find_activation(const std::string& name);
Routing find_routing(const std::string& name);
NormKind find_norm_kind(const std::string& name);

// A `vivace.techniques.weight_formats.base.Packed` and the array whose memory it reads.
struct PackedMatrix {
  using Raw = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  Format format;
  int32_t rows, K;
  Raw raw;
};
PackedMatrix bind_packed(nb::handle packed);
// Whether it holds neither NaN nor infinity.
bool is_finite(const Kernels& kernels, Pool& pool, const PackedMatrix& matrix);

// Arrays of one step that must live as long as it runs.
struct StepReferences {
  std::vector<In<int32_t>> int32;
  std::vector<In<int64_t>> int64;
  std::vector<In<uint8_t>> bytes;
  std::vector<In<float>> floats;
  std::vector<Matrix> matrices;
};

// A group's rows as `flatten` in executors/native.py gives them.
GroupStep bind_group(nb::handle flat, int64_t num_rows, StepReferences& kept);

void bind_blocks(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_program(nb::module_& m);
void bind_sampler(nb::module_& m);
void bind_ops(nb::module_& m);
void bind_pack(nb::module_& m);

}  // namespace vivace
