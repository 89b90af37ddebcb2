// The module `vivace._native`.
#include "bindings.h"

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>

namespace vivace {

// One pool per number of threads in a process: two that spin would take each other's cores.
std::shared_ptr<Pool> shared_pool(std::optional<int> threads) {
  static std::mutex mutex;
  static std::map<int, std::weak_ptr<Pool>> pools;
  if (threads && (*threads < 1 || *threads > 1024))
    throw NativeError("threads is " + std::to_string(*threads) + ": expected 1 to 1024");
  const int count = threads ? *threads : default_threads();  // the default reads files
  const std::lock_guard lock(mutex);
  std::shared_ptr<Pool> pool = pools[count].lock();
  if (!pool) pools[count] = pool = std::make_shared<Pool>(count);
  return pool;
}

const Kernels& find_kernels(const std::optional<std::string>& isa) {
  try {
    return select_kernels(isa ? isa->c_str() : nullptr);
  } catch (const std::invalid_argument& error) {
    throw NativeError(error.what());
  }
}

KVType find_kv_type(const std::string& name) {
  if (name == "float32") return KVType::float32;
  if (name == "bfloat16") return KVType::bfloat16;
  throw NativeError("there is no key/value kernel '" + name + "': expected float32 or bfloat16");
}

Activation find_activation(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  throw NativeError("the native executor has no activation '" + name + "'");
}

Routing find_routing(const std::string& name) {
  if (name == "softmax") return Routing::softmax;
  if (name == "softmax_chosen") return Routing::softmax_chosen;
  if (name == "sparse_mixer") return Routing::sparse_mixer;
  throw NativeError("the native executor has no routing '" + name + "'");
}

NormKind find_norm_kind(const std::string& name) {
  if (name == "rms") return NormKind::rms;
  if (name == "layer") return NormKind::layer;
  throw NativeError("the native executor has no norm '" + name + "'");
}

namespace {

const char* const kMisfit = "block ids, trees or log-weights do not fit the segments";

bool fits_int32(int64_t value) {
  return value == static_cast<int32_t>(value);
}

}  // namespace

// The columns of `spans` and `segments` are those of `flatten` in executors/native.py.
GroupStep bind_group(nb::handle flat, int64_t num_rows, StepReferences& kept) {
  const auto slots = nb::cast<In<int64_t>>(flat[0]);
  const auto spans = nb::cast<Array<const int64_t, 2>>(flat[1]);
  const auto segments = nb::cast<Array<const int64_t, 2>>(flat[2]);
  const auto block_ids = nb::cast<In<int32_t>>(flat[3]);
  const auto trees = nb::cast<In<uint8_t>>(flat[4]);
  const auto log_weights = nb::cast<In<float>>(flat[5]);
  require(static_cast<int64_t>(slots.size()) == num_rows, "a step needs one slot per row");
  require(spans.shape(1) == 3 && segments.shape(1) == 11, "spans or segments are misshapen");
  GroupStep group;
  group.slots = slots.data();
  group.segments.resize(segments.shape(0));
  size_t segment = 0, block = 0, tree = 0, weight = 0;
  const auto left = [](const auto& array, size_t used) {
    return static_cast<int64_t>(array.size() - used);
  };
  for (size_t s = 0; s < spans.shape(0); ++s) {
    Span span = {spans(s, 0), spans(s, 1), group.segments.data() + segment, spans(s, 2), 0};
    require(span.num_rows >= 0 && span.num_rows <= num_rows, "a span has no such rows");
    require(span.num_segments >= 0 && segment + span.num_segments <= segments.shape(0),
            "spans name more segments than there are");
    for (int64_t i = 0; i < span.num_segments; ++i, ++segment) {
      const int64_t* row = segments.data() + segment * segments.shape(1);
      require(std::all_of(row, row + 10, fits_int32), "a segment's number is beyond 32 bits");
      require(row[0] >= 0 && row[1] >= 0, "a segment has a negative size");
      const int64_t tree_size = row[9] < 0 ? 0 : span.num_rows * row[9];
      const int64_t num_weights = row[10] ? row[1] : 0;
      require(row[0] <= left(block_ids, block) && tree_size <= left(trees, tree) &&
                  num_weights <= left(log_weights, weight),
              kMisfit);
      Segment& to = group.segments[segment];
      to = {block_ids.data() + block,
            row[0],
            row[1],
            row[2],
            static_cast<MaskKind>(row[3]),
            row[4],
            row[5],
            row[6],
            row[7],
            row[8],
            nullptr,
            0,
            nullptr};
      block += row[0];
      if (row[9] >= 0) {
        to.tree = trees.data() + tree;
        to.tree_entries = row[9];
      }
      if (row[10]) to.log_weights = log_weights.data() + weight;
      tree += tree_size;
      weight += num_weights;
      span.num_entries += row[1];
    }
    group.spans.push_back(span);
  }
  require(segment == segments.shape(0) && block == block_ids.size() && tree == trees.size() &&
              weight == log_weights.size(),
          kMisfit);
  kept.int64.push_back(slots);
  kept.int32.push_back(block_ids);
  kept.bytes.push_back(trees);
  kept.floats.push_back(log_weights);
  return group;
}

namespace {

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const NativeError& error) {
    const nb::object type = nb::module_::import_("vivace.errors").attr("NativeError");
    PyErr_SetString(type.ptr(), error.what());
  }
}

}  // namespace

NB_MODULE(_native, m) {
  nb::register_exception_translator(translate);
  bind_blocks(m);
  bind_linear(m);
  bind_program(m);
  bind_sampler(m);
  bind_ops(m);
  bind_pack(m);
}

}  // namespace vivace
