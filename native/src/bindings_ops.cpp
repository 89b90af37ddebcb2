// Single kernels, for tests and benchmarks.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstring>

#include "attend.h"
#include "bindings.h"

namespace vivace {

namespace {

using OptionalIsa = std::optional<std::string>;

// One layer's cache and attention over it.
class Attention {
 public:
  Attention(const std::string& kv_kernel, int num_kv_heads, int head_dim, int64_t num_blocks,
            int block_size, const OptionalIsa& isa, int threads)
      : kernels_(find_kernels(isa)),
        pool_(shared_pool(threads)),
        cache_(find_kv_type(kv_kernel), 1, num_kv_heads, head_dim, num_blocks, block_size) {}

  void fill(int byte) { cache_.fill(byte); }

  // keys and values [n, num_kv_heads, head_dim]
  void write(In<int64_t> slots, Array<const float, 3> keys, Array<const float, 3> values) {
    const size_t size = slots.size() * cache_.num_kv_heads() * cache_.head_dim();
    require(keys.size() == size && values.size() == size, "keys or values have the wrong shape");
    const int64_t num_slots = cache_.num_blocks() * cache_.block_size();
    for (size_t i = 0; i < slots.size(); ++i) {
      require(slots(i) >= 0 && slots(i) < num_slots, "there is no such slot");
      for (int head = 0; head < cache_.num_kv_heads(); ++head) {
        const int64_t at = (i * cache_.num_kv_heads() + head) * cache_.head_dim();
        kernels_.attention->write_key(cache_.layer(0), slots(i), head, keys.data() + at);
        kernels_.attention->write_value(cache_.layer(0), slots(i), head, values.data() + at);
      }
    }
  }

  // queries [n, num_heads, head_dim] -> out, its log-sum-exp [n, num_heads], sums of weights.
  nb::tuple attend(Array<const float, 3> queries, In<int32_t> positions, nb::handle group,
                   float scale, float soft_cap, std::optional<In<float>> sinks, bool wants_sums) {
    const size_t rows = queries.shape(0), heads = queries.shape(1);
    require(queries.shape(2) == static_cast<size_t>(cache_.head_dim()) &&
                heads % cache_.num_kv_heads() == 0 && positions.size() == rows,
            "queries or positions have the wrong shape");
    require(!sinks || sinks->size() == heads, "sinks need one value per head");
    StepReferences kept;
    const GroupStep step = bind_group(group, static_cast<int64_t>(rows), kept);
    const auto out = new_array<float>({rows, heads, queries.shape(2)});
    const auto lse = new_array<float>({rows, heads});
    size_t num_sums = 0;
    for (const Span& span : step.spans) num_sums += heads * span.num_entries;
    const auto sums = new_array<float>({wants_sums ? num_sums : 0});
    std::memset(sums.data(), 0, sums.size() * sizeof(float));
    std::vector<float> stats(rows * heads * 2, NAN);
    AttentionCall call = {};
    call.cache = cache_.layer(0);
    call.queries = queries.data();
    call.q_stride = call.out_stride = static_cast<int64_t>(heads) * cache_.head_dim();
    call.out = out.data();
    call.stats = stats.data();
    call.positions = positions.data();
    call.spans = step.spans.data();
    call.num_spans = static_cast<int64_t>(step.spans.size());
    call.num_heads = static_cast<int>(heads);
    call.num_kv_heads = cache_.num_kv_heads();
    call.head_dim = cache_.head_dim();
    call.scale = scale;
    call.soft_cap = soft_cap;
    call.sinks = sinks ? sinks->data() : nullptr;
    {
      const nb::gil_scoped_release release;
      Attend().run(kernels_, *pool_, call, wants_sums ? sums.data() : nullptr);
    }
    for (size_t i = 0; i < rows * heads; ++i)
      lse.data()[i] = static_cast<float>(stats[2 * i] + std::log(double{stats[2 * i + 1]}));
    return nb::make_tuple(out, lse, sums);
  }

 private:
  const Kernels& kernels_;
  std::shared_ptr<Pool> pool_;
  KVCache cache_;
};

// x [n, size] -> the same shape
nb::object norm(const Matrix& x, const std::string& kind, In<float> weight,
                std::optional<In<float>> bias, float eps, const OptionalIsa& isa) {
  require(weight.size() == x.shape(1) && (!bias || bias->size() == x.shape(1)),
          "the norm has the wrong size");
  const Norm norm = {find_norm_kind(kind), weight.data(), bias ? bias->data() : nullptr, eps,
                     static_cast<int>(x.shape(1))};
  const auto y = new_array<float>({x.shape(0), x.shape(1)});
  const FloatEnvironment environment;
  for (size_t row = 0; row < x.shape(0); ++row)
    find_kernels(isa).ops->norm(norm, x.data() + row * norm.size, y.data() + row * norm.size);
  return nb::cast(y);
}

nb::object activate(const std::string& activation, In<float> gate, std::optional<In<float>> up,
                    const OptionalIsa& isa) {
  require(!up || up->size() == gate.size(), "gate and up differ in size");
  const auto y = new_array<float>({gate.size()});
  const FloatEnvironment environment;
  find_kernels(isa).ops->activate(find_activation(activation), gate.data(),
                                  up ? up->data() : nullptr, y.data(),
                                  static_cast<int64_t>(gate.size()));
  return nb::cast(y);
}

// heads [n, head_dim], each rotated by cos and sin [half]
nb::object rotate(const Matrix& heads, In<float> cos, In<float> sin, bool is_interleaved,
                  const OptionalIsa& isa) {
  require(cos.size() == sin.size() && 2 * cos.size() <= heads.shape(1), "the table is too wide");
  const auto y = new_array<float>({heads.shape(0), heads.shape(1)});
  std::memcpy(y.data(), heads.data(), heads.size() * sizeof(float));
  const FloatEnvironment environment;
  for (size_t row = 0; row < heads.shape(0); ++row)
    find_kernels(isa).ops->rotate(y.data() + row * heads.shape(1), cos.data(), sin.data(),
                                  static_cast<int>(cos.size()), is_interleaved);
  return nb::cast(y);
}

nb::object soft_cap(In<float> x, float cap, float scale, const OptionalIsa& isa) {
  const auto y = new_array<float>({x.size()});
  std::memcpy(y.data(), x.data(), x.size() * sizeof(float));
  const FloatEnvironment environment;
  find_kernels(isa).ops->soft_cap(y.data(), cap, scale, static_cast<int64_t>(x.size()));
  return nb::cast(y);
}

// exp((x - maximum) * scale) and its sums by 64, and the maximum.
nb::tuple softmax_parts(In<float> x, float scale, const OptionalIsa& isa) {
  const auto y = new_array<float>({x.size()});
  const auto sums = new_array<float>({(x.size() + 63) / 64});
  const FloatEnvironment environment;
  const OpKernels& ops = *find_kernels(isa).ops;
  const float maximum = ops.maximum(x.data(), static_cast<int64_t>(x.size()), nullptr, nullptr);
  ops.exp_sums(x.data(), maximum, scale, y.data(), sums.data(), static_cast<int64_t>(x.size()));
  return nb::make_tuple(y, sums, maximum);
}

}  // namespace

void bind_ops(nb::module_& m) {
  nb::class_<Attention>(m, "Attention")
      .def(nb::init<const std::string&, int, int, int64_t, int, const OptionalIsa&, int>(),
           nb::arg("kv_kernel"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
           nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("isa").none() = nb::none(),
           nb::arg("threads") = 1)
      .def("fill", &Attention::fill, nb::arg("byte"))
      .def("write", &Attention::write, nb::arg("slots"), nb::arg("keys"), nb::arg("values"))
      .def("__call__", &Attention::attend, nb::arg("queries"), nb::arg("positions"),
           nb::arg("group"), nb::arg("scale"), nb::arg("soft_cap") = 0.0f,
           nb::arg("sinks").none() = nb::none(), nb::arg("wants_sums") = false);
  const auto isa = [] { return nb::arg("isa").none() = nb::none(); };
  m.def("norm", &norm, nb::arg("x"), nb::arg("kind"), nb::arg("weight"), nb::arg("bias").none(),
        nb::arg("eps"), isa());
  m.def("activate", &activate, nb::arg("activation"), nb::arg("gate"),
        nb::arg("up").none() = nb::none(), isa());
  m.def("rotate", &rotate, nb::arg("heads"), nb::arg("cos"), nb::arg("sin"),
        nb::arg("is_interleaved"), isa());
  m.def("soft_cap", &soft_cap, nb::arg("x"), nb::arg("cap"), nb::arg("scale"), isa());
  m.def("softmax_parts", &softmax_parts, nb::arg("x"), nb::arg("scale"), isa());
}

}  // namespace vivace
