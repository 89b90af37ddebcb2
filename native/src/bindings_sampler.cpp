// Python's view of the sampler.
#include <nanobind/stl/optional.h>

#include <algorithm>

#include "bindings.h"
#include "sampler.h"

namespace vivace {

namespace {

struct SampleLists {
  In<int64_t> offsets;
  In<int32_t> ids;
};

TokenLists bind_lists(nb::handle lists, size_t ids_at, int64_t num_rows, const char* name,
                      std::vector<SampleLists>& kept) {
  if (lists.is_none()) return {};
  kept.push_back({nb::cast<In<int64_t>>(lists[0]), nb::cast<In<int32_t>>(lists[ids_at])});
  const auto& [offsets, ids] = kept.back();
  bool is_sound = static_cast<int64_t>(offsets.size()) == num_rows + 1 && offsets(0) == 0 &&
                  offsets(num_rows) == static_cast<int64_t>(ids.size());
  for (int64_t row = 0; is_sound && row < num_rows; ++row)
    is_sound = offsets(row) <= offsets(row + 1);
  require(is_sound, std::string(name) + " needs one ascending offset per row and one more");
  return {offsets.data(), ids.data()};
}

// Where log-probabilities go: (values [rows], top_ids [rows, n], top_values [rows, n]) or None.
nb::object new_log_probs(SampleArrays& arrays, std::optional<int64_t> num_top) {
  if (!num_top) return nb::none();
  require(*num_top >= 0 && *num_top <= arrays.vocab_size, "num_logprobs is out of range");
  const size_t rows = arrays.num_rows, top = *num_top;
  const auto values = new_array<float>({rows});
  const auto top_ids = new_array<int32_t>({rows, top});
  const auto top_values = new_array<float>({rows, top});
  arrays.logprobs = values.data();
  arrays.top_ids = top_ids.data();
  arrays.top_logprobs = top_values.data();
  arrays.num_top = *num_top;
  return nb::make_tuple(values, top_ids, top_values);
}

nb::object py_sample(Matrix logits, Array<const double, 2> options, Array<const uint64_t, 2> keys,
                     nb::handle history, nb::handle bias, nb::handle forbidden,
                     std::optional<int64_t> num_logprobs, int threads) {
  SampleArrays arrays;
  arrays.num_rows = static_cast<int64_t>(logits.shape(0));
  arrays.vocab_size = static_cast<int64_t>(logits.shape(1));
  arrays.logits = logits.data();
  require(options.shape(0) == logits.shape(0) && options.shape(1) == 8,
          "options need eight numbers per row");
  require(keys.shape(0) == logits.shape(0) && keys.shape(1) == 4, "keys need four numbers per row");
  static_assert(sizeof(SamplingOptions) == 8 * sizeof(double));
  static_assert(sizeof(RandomKey) == 4 * sizeof(uint64_t));
  arrays.options = reinterpret_cast<const SamplingOptions*>(options.data());
  arrays.keys = reinterpret_cast<const RandomKey*>(keys.data());
  std::vector<SampleLists> kept;
  kept.reserve(3);
  arrays.history = bind_lists(history, 2, arrays.num_rows, "the history", kept);
  std::optional<In<int64_t>> num_prompt_ids;
  if (!history.is_none()) {
    num_prompt_ids = nb::cast<In<int64_t>>(history[1]);
    require(num_prompt_ids->size() == logits.shape(0), "the history needs prompt lengths");
    arrays.num_prompt_ids = num_prompt_ids->data();
  }
  arrays.bias = bind_lists(bias, 1, arrays.num_rows, "the bias", kept);
  std::optional<In<float>> bias_values;
  if (!bias.is_none()) {
    bias_values = nb::cast<In<float>>(bias[2]);
    require(bias_values->size() == kept.back().ids.size(), "the bias needs one value per token");
    arrays.bias_values = bias_values->data();
  }
  arrays.forbidden = bind_lists(forbidden, 1, arrays.num_rows, "forbidden", kept);
  const nb::object log_probs_out = new_log_probs(arrays, num_logprobs);
  const auto tokens = new_array<int32_t>({logits.shape(0)});
  arrays.tokens = tokens.data();
  const std::shared_ptr<Pool> pool = shared_pool(threads);
  {
    const nb::gil_scoped_release release;
    sample(find_kernels({}), *pool, arrays);
  }
  return nb::make_tuple(tokens, log_probs_out);
}

nb::object py_log_probs(Matrix logits, In<int32_t> targets, int64_t num_top, int threads) {
  SampleArrays arrays;
  arrays.num_rows = static_cast<int64_t>(logits.shape(0));
  arrays.vocab_size = static_cast<int64_t>(logits.shape(1));
  arrays.logits = logits.data();
  require(targets.size() == logits.shape(0), "log_probs needs one target per row");
  nb::object out = new_log_probs(arrays, num_top);
  const std::shared_ptr<Pool> pool = shared_pool(threads);
  {
    const nb::gil_scoped_release release;
    log_probs(find_kernels({}), *pool, arrays, targets.data());
  }
  return out;
}

}  // namespace

void bind_sampler(nb::module_& m) {
  m.def("sample", &py_sample, nb::arg("logits"), nb::arg("options"), nb::arg("keys"),
        nb::arg("history").none() = nb::none(), nb::arg("bias").none() = nb::none(),
        nb::arg("forbidden").none() = nb::none(), nb::arg("num_logprobs").none() = nb::none(),
        nb::arg("threads") = 1);
  m.def("log_probs", &py_log_probs, nb::arg("logits"), nb::arg("targets"),
        nb::arg("num_logprobs") = 0, nb::arg("threads") = 1);
}

}  // namespace vivace
