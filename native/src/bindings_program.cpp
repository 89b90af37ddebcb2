// Python's view of a program: bound once, then one call per step.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <map>
#include <utility>

#include "bindings.h"
#include "check.h"

namespace vivace {

namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
T attribute(nb::handle object, const char* name) {
  return nb::cast<T>(object.attr(name));
}

float float_or_zero(nb::handle value) {
  return value.is_none() ? 0.0f : nb::cast<float>(value);
}

std::string text(nb::handle value) {
  return nb::cast<std::string>(nb::str(value));
}

// A program and the Python objects whose memory it reads.
class BoundProgram {
 public:
  BoundProgram(int hidden_size, int vocab_size, const std::string& kv_kernel,
               std::optional<int> threads, std::optional<std::string> isa)
      : program_(find_kernels(isa), shared_pool(threads), hidden_size, vocab_size,
                 find_kv_type(kv_kernel)) {}

  std::string isa() const { return program_.kernels().name; }
  int num_threads() { return program_.pool().threads(); }

  bool is_finite(nb::handle packed) {
    const PackedMatrix matrix = bind_packed(packed);
    nb::gil_scoped_release release;
    return vivace::is_finite(program_.kernels(), program_.pool(), matrix);
  }

  void set_rope(size_t index, Matrix cos, Matrix sin, bool is_interleaved) {
    require(cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1),
            "rope tables differ in shape");
    program_.set_rope(index, {cos.data(), sin.data(), static_cast<int64_t>(cos.shape(0)),
                              static_cast<int>(cos.shape(1)), is_interleaved});
    if (ropes_.size() <= index) ropes_.resize(index + 1);
    ropes_[index] = {std::move(cos), std::move(sin)};
  }

  void add_group(int num_layers, int num_kv_heads, int head_dim) {
    program_.add_group({num_layers, num_kv_heads, head_dim});
  }

  void set_embedding(nb::handle weight, float scale, nb::handle positions) {
    Embedding embedding;
    const PackedMatrix& tokens = bind_matrix(weight, program_.hidden_size());
    require(tokens.rows == program_.vocab_size(),
            "the embedding has " + std::to_string(tokens.rows) + " rows, expected " +
                std::to_string(program_.vocab_size()));
    embedding.format = tokens.format;
    embedding.weight = tokens.raw.data();
    embedding.scale = scale;
    if (!positions.is_none()) {
      const PackedMatrix& learned = bind_matrix(positions, program_.hidden_size());
      embedding.positions_format = learned.format;
      embedding.positions = learned.raw.data();
      embedding.num_positions = learned.rows;
    }
    program_.set_embedding(embedding);
  }

  void set_head(nb::handle spec, nb::handle linear, nb::handle norm) {
    Head head;
    head.linear = bind(spec.attr("linear"), linear);
    head.norm = bind_norm(spec.attr("norm"), norm);
    head.scale = attribute<float>(spec, "scale");
    head.soft_cap = float_or_zero(spec.attr("soft_cap"));
    program_.set_head(std::move(head));
  }

  void add_attention(nb::handle spec, nb::handle qkv, nb::handle out, nb::handle norm,
                     nb::handle post_norm, nb::handle q_norm, nb::handle k_norm, nb::handle sinks) {
    Block block = bind_block(BlockKind::attention, spec, norm, post_norm);
    block.in = bind(spec.attr("qkv"), qkv);
    block.out = bind(spec.attr("out"), out);
    block.num_heads = attribute<int>(spec, "num_heads");
    block.num_kv_heads = attribute<int>(spec, "num_kv_heads");
    block.head_dim = attribute<int>(spec, "head_dim");
    block.rope = spec.attr("rope").is_none() ? -1 : attribute<int>(spec, "rope");
    block.group = attribute<int>(spec, "group");
    block.cache_layer = attribute<int>(spec, "cache_layer");
    block.q_norm = bind_norm(spec.attr("q_norm"), q_norm);
    block.k_norm = bind_norm(spec.attr("k_norm"), k_norm);
    block.scale = attribute<float>(spec, "scale");
    block.soft_cap = float_or_zero(spec.attr("soft_cap"));
    if (!sinks.is_none()) block.sinks = bind_vector(sinks, block.num_heads, "sinks");
    program_.add_block(std::move(block));
  }

  void add_mlp(nb::handle spec, nb::handle gate_up, nb::handle down, nb::handle norm,
               nb::handle post_norm) {
    Block block = bind_block(BlockKind::mlp, spec, norm, post_norm);
    block.experts.push_back(bind_expert(spec, gate_up, down));
    block.activation = find_activation(text(spec.attr("activation")));
    program_.add_block(std::move(block));
  }

  void add_linear(nb::handle spec, nb::handle linear, nb::handle norm, nb::handle post_norm) {
    Block block = bind_block(BlockKind::linear, spec, norm, post_norm);
    block.out = bind(spec.attr("linear"), linear);
    program_.add_block(std::move(block));
  }

  // `experts` is a list of (gate_up, down), `shared` one of them or None.
  void add_experts(nb::handle spec, nb::handle router, nb::handle shared_gate, nb::list experts,
                   nb::handle shared, nb::handle norm, nb::handle post_norm) {
    Block block = bind_block(BlockKind::experts, spec, norm, post_norm);
    block.in = bind(spec.attr("router"), router);
    block.has_shared_gate = !shared_gate.is_none();
    if (block.has_shared_gate) {
      const Linear gate = bind(spec.attr("shared_gate"), shared_gate);
      check_linear(gate, program_.hidden_size(), "shared_gate");
      block.in.parts.insert(block.in.parts.end(), gate.parts.begin(), gate.parts.end());
    }
    const nb::object specs = spec.attr("experts");
    for (size_t i = 0; i < experts.size(); ++i)
      block.experts.push_back(bind_expert(specs[i], experts[i][0], experts[i][1]));
    block.has_shared = !shared.is_none();
    if (block.has_shared)
      block.experts.push_back(bind_expert(spec.attr("shared"), shared[0], shared[1]));
    block.num_active = attribute<int>(spec, "num_active");
    block.activation = find_activation(text(spec.attr("activation")));
    block.routing = find_routing(text(spec.attr("routing")));
    block.jitter = attribute<float>(spec, "jitter");
    program_.add_block(std::move(block));
  }

  void set_site(int64_t block, nb::object callback) {
    if (callback.is_none()) {
      program_.set_site(block, nullptr);
      sites_.erase(block);
      return;
    }
    program_.set_site(block, [this, block](float* x, int64_t rows, int64_t hidden) {
      return call_site(block, x, rows, hidden);
    });
    sites_[block] = std::move(callback);
  }

  void allocate(const std::vector<int64_t>& num_blocks, int block_size) {
    program_.allocate(num_blocks, block_size);
  }

  void copy_blocks(int64_t group, In<int32_t> sources, In<int32_t> targets) {
    require(sources.size() == targets.size(), "copy_blocks needs as many sources as targets");
    KVCache& cache = program_.cache(group);
    for (size_t i = 0; i < sources.size(); ++i) cache.copy(sources(i), targets(i));
  }

  nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>> read_blocks(int64_t group, In<int32_t> ids) {
    const KVCache& cache = program_.cache(group);
    const size_t bytes = static_cast<size_t>(cache.bytes_per_block());
    auto raw = std::make_unique<uint8_t[]>(std::max<size_t>(1, ids.size() * bytes));
    for (size_t i = 0; i < ids.size(); ++i) cache.read(ids(i), raw.get() + i * bytes);
    uint8_t* data = raw.release();
    const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    return {data, {ids.size(), bytes}, owner};
  }

  void write_blocks(int64_t group, In<int32_t> ids, Array<const uint8_t, 2> raw) {
    KVCache& cache = program_.cache(group);
    const size_t bytes = static_cast<size_t>(cache.bytes_per_block());
    require(raw.shape(0) == ids.size() && raw.shape(1) == bytes,
            "write_blocks needs [" + std::to_string(ids.size()) + ", " + std::to_string(bytes) +
                "] bytes, not [" + std::to_string(raw.shape(0)) + ", " +
                std::to_string(raw.shape(1)) + "]");
    for (size_t i = 0; i < ids.size(); ++i) cache.write(ids(i), raw.data() + i * bytes);
  }

  void fill_cache(int byte) {
    for (size_t group = 0; group < program_.num_caches(); ++group) program_.cache(group).fill(byte);
  }

  // For Python's collector of cycles.
  static int traverse(PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!nb::inst_ready(self)) return 0;
    for (const auto& [block, site] : nb::inst_ptr<BoundProgram>(self)->sites_) Py_VISIT(site.ptr());
    return 0;
  }
  static int clear(PyObject* self) {
    BoundProgram* program = nb::inst_ptr<BoundProgram>(self);
    while (!program->sites_.empty()) program->set_site(program->sites_.begin()->first, nb::none());
    return 0;
  }

  // True if the step was cancelled.
  bool run(In<int32_t> tokens, In<int32_t> positions, nb::handle embeddings, nb::list groups,
           In<int32_t> logits_rows, nb::handle logits, nb::list hidden, nb::handle top,
           nb::handle sums, int first_block, int last_block, In<int32_t> cancel) {
    StepReferences arrays;
    StepArrays step;
    step.num_rows = static_cast<int64_t>(tokens.size());
    require(positions.size() == tokens.size(), "a step has as many positions as tokens");
    step.tokens = tokens.data();
    step.positions = positions.data();
    step.first_block = first_block;
    step.last_block = last_block;
    step.cancel = cancel.size() > 0 ? cancel.data() : nullptr;
    bind_embeddings(step, embeddings, arrays);
    step.groups.resize(groups.size());
    for (size_t i = 0; i < groups.size(); ++i)
      step.groups[i] = bind_group(groups[i], step.num_rows, arrays);
    step.logits_rows = logits_rows.data();
    const auto out = nb::cast<Array<float, 2>>(logits, false);
    step.num_logits = static_cast<int64_t>(out.shape(0));
    require(step.num_logits == 0 || (out.shape(0) == logits_rows.size() &&
                                     static_cast<int>(out.shape(1)) == program_.vocab_size()),
            "logits have the wrong shape");
    step.logits = out.data();
    bind_outputs(step, hidden, top, sums, arrays);
    site_error_ = nullptr;
    bool is_cancelled = false;
    {
      const nb::gil_scoped_release release;
      is_cancelled = program_.run(step);
    }
    if (site_error_) std::rethrow_exception(std::exchange(site_error_, nullptr));
    return is_cancelled;
  }

 private:
  bool call_site(int64_t block, float* x, int64_t rows, int64_t hidden) {
    const nb::gil_scoped_acquire acquire;
    try {
      const size_t shape[2] = {static_cast<size_t>(rows), static_cast<size_t>(hidden)};
      const nb::ndarray<nb::numpy, float, nb::ndim<2>> view(x, 2, shape, nb::handle());
      sites_.at(block)(nb::cast(view, nb::rv_policy::reference));
    } catch (...) {
      site_error_ = std::current_exception();
    }
    return !site_error_;
  }

  static void bind_embeddings(StepArrays& step, nb::handle embeddings, StepReferences& arrays) {
    if (embeddings.is_none()) return;
    const auto rows = nb::cast<In<int32_t>>(embeddings[0]);
    const auto given = nb::cast<Matrix>(embeddings[1]);
    require(rows.size() == given.shape(0), "embeddings need one row number each");
    step.given_rows = rows.data();
    step.given = given.data();
    step.num_given = static_cast<int64_t>(rows.size());
    arrays.int32.push_back(rows);
    arrays.matrices.push_back(given);
  }

  void bind_outputs(StepArrays& step, nb::list hidden, nb::handle top, nb::handle sums,
                    StepReferences& arrays) {
    for (nb::handle want : hidden) {
      const auto rows = nb::cast<In<int32_t>>(want[1]);
      const auto out = nb::cast<Array<float, 2>>(want[2], false);
      require(
          out.shape(0) == rows.size() && static_cast<int>(out.shape(1)) == program_.hidden_size(),
          "hidden states have the wrong shape");
      step.hidden.push_back(
          {nb::cast<int>(want[0]), rows.data(), static_cast<int64_t>(rows.size()), out.data()});
      arrays.int32.push_back(rows);
    }
    if (!top.is_none()) {
      const auto ids = nb::cast<Array<int32_t, 2>>(top[0], false);
      const auto values = nb::cast<Array<float, 2>>(top[1], false);
      require(static_cast<int64_t>(ids.shape(0)) == step.num_logits &&
                  ids.shape(0) == values.shape(0) && ids.shape(1) == values.shape(1),
              "top logits have the wrong shape");
      step.num_top = static_cast<int64_t>(ids.shape(1));
      step.top_ids = ids.data();
      step.top_logits = values.data();
    }
    if (!sums.is_none()) {
      const auto out = nb::cast<Array<float, 1>>(sums, false);
      step.attention_sums = out.data();
      step.num_sums = static_cast<int64_t>(out.size());
    }
  }

  const PackedMatrix& bind_matrix(nb::handle packed, int in_features) {
    matrices_.push_back(std::make_unique<PackedMatrix>(bind_packed(packed)));
    require(matrices_.back()->K == in_features, "a weight has the wrong shape");
    return *matrices_.back();
  }

  const float* bind_vector(nb::handle value, int size, const char* name) {
    const auto vector = nb::cast<Floats>(value);
    require(static_cast<int>(vector.size()) == size,
            std::string(name) + " needs " + std::to_string(size) + " float32 values");
    vectors_.push_back(vector);
    return vector.data();
  }

  // `arrays` is a list of (packed, bias or None).
  Linear bind(nb::handle spec, nb::handle arrays) {
    Linear linear;
    linear.in_features = attribute<int>(spec, "in_features");
    for (nb::handle part : nb::cast<nb::list>(arrays)) {
      const PackedMatrix& matrix = bind_matrix(part[0], linear.in_features);
      const nb::object bias = part[1];
      linear.parts.push_back({matrix.format, matrix.raw.data(),
                              bias.is_none() ? nullptr : bind_vector(bias, matrix.rows, "a bias"),
                              matrix.rows});
    }
    require(!linear.parts.empty(), "a linear needs at least one part");
    return linear;
  }

  // `arrays` is None or (weight, bias or None).
  Norm bind_norm(nb::handle spec, nb::handle arrays) {
    if (spec.is_none()) return {};
    Norm norm;
    norm.kind = find_norm_kind(text(spec.attr("kind")));
    const auto weight = nb::cast<Floats>(arrays[0]);
    norm.size = static_cast<int>(weight.size());
    norm.weight = bind_vector(arrays[0], norm.size, "a norm");
    const nb::object bias = arrays[1];
    if (!bias.is_none()) norm.bias = bind_vector(bias, norm.size, "a norm's bias");
    norm.eps = attribute<float>(spec, "eps");
    return norm;
  }

  Expert bind_expert(nb::handle spec, nb::handle gate_up, nb::handle down) {
    return {bind(spec.attr("gate_up"), gate_up), bind(spec.attr("down"), down)};
  }

  Block bind_block(BlockKind kind, nb::handle spec, nb::handle norm, nb::handle post_norm) {
    Block block;
    block.kind = kind;
    block.norm = bind_norm(spec.attr("norm"), norm);
    block.post_norm = bind_norm(spec.attr("post_norm"), post_norm);
    block.residual_scale = attribute<float>(spec, "residual_scale");
    return block;
  }

  Program program_;
  std::map<int64_t, nb::object> sites_;  // these may hold the program in turn: see `traverse`
  std::vector<std::unique_ptr<PackedMatrix>> matrices_;
  std::vector<Floats> vectors_;
  std::vector<std::pair<Matrix, Matrix>> ropes_;
  std::exception_ptr site_error_;
};

}  // namespace

void bind_program(nb::module_& m) {
  using P = BoundProgram;
  static PyType_Slot slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&P::traverse)},
                                {Py_tp_clear, reinterpret_cast<void*>(&P::clear)},
                                {0, nullptr}};
  nb::class_<P>(m, "Program", nb::type_slots(slots))
      .def(nb::init<int, int, const std::string&, std::optional<int>, std::optional<std::string>>(),
           nb::arg("hidden_size"), nb::arg("vocab_size"), nb::arg("kv_kernel"),
           nb::arg("threads").none(), nb::arg("isa").none())
      .def_prop_ro("isa", &P::isa)
      .def_prop_ro("num_threads", &P::num_threads)
      .def("is_finite", &P::is_finite, nb::arg("packed"))
      .def("set_rope", &P::set_rope, nb::arg("index"), nb::arg("cos"), nb::arg("sin"),
           nb::arg("is_interleaved"))
      .def("add_group", &P::add_group, nb::arg("num_layers"), nb::arg("num_kv_heads"),
           nb::arg("head_dim"))
      .def("set_embedding", &P::set_embedding, nb::arg("weight"), nb::arg("scale"),
           nb::arg("positions").none())
      .def("set_head", &P::set_head, nb::arg("spec"), nb::arg("linear"), nb::arg("norm").none())
      .def("add_attention", &P::add_attention, nb::arg("spec"), nb::arg("qkv"), nb::arg("out"),
           nb::arg("norm").none(), nb::arg("post_norm").none(), nb::arg("q_norm").none(),
           nb::arg("k_norm").none(), nb::arg("sinks").none())
      .def("add_mlp", &P::add_mlp, nb::arg("spec"), nb::arg("gate_up"), nb::arg("down"),
           nb::arg("norm").none(), nb::arg("post_norm").none())
      .def("add_linear", &P::add_linear, nb::arg("spec"), nb::arg("linear"), nb::arg("norm").none(),
           nb::arg("post_norm").none())
      .def("add_experts", &P::add_experts, nb::arg("spec"), nb::arg("router"),
           nb::arg("shared_gate").none(), nb::arg("experts"), nb::arg("shared").none(),
           nb::arg("norm").none(), nb::arg("post_norm").none())
      .def("set_site", &P::set_site, nb::arg("block_index"), nb::arg("site").none())
      .def("allocate", &P::allocate, nb::arg("num_blocks"), nb::arg("block_size"))
      .def("copy_blocks", &P::copy_blocks, nb::arg("group"), nb::arg("sources"), nb::arg("targets"))
      .def("read_blocks", &P::read_blocks, nb::arg("group"), nb::arg("block_ids"))
      .def("write_blocks", &P::write_blocks, nb::arg("group"), nb::arg("block_ids"), nb::arg("raw"))
      .def("fill_cache", &P::fill_cache, nb::arg("byte"))
      .def("run", &P::run, nb::arg("tokens"), nb::arg("positions"), nb::arg("embeddings").none(),
           nb::arg("groups"), nb::arg("logits_rows"), nb::arg("logits"), nb::arg("hidden"),
           nb::arg("top").none(), nb::arg("sums").none(), nb::arg("first_block"),
           nb::arg("last_block"), nb::arg("cancel"));
}

}  // namespace vivace
