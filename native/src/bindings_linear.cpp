// What Python sees of the kernels and the machine: for tests, doctor and benchmarks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "pool.h"

namespace nb = nanobind;

namespace vivace {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using Clock = std::chrono::steady_clock;

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(4096)); }
};
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

template <class T>
Aligned<T> make_aligned(size_t count) {
  void* memory = ::operator new(std::max<size_t>(count, 1) * sizeof(T), std::align_val_t(4096));
  return Aligned<T>(static_cast<T*>(memory));
}

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i)
    if (isa_available(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  return names;
}

// A linear group on its own: weights are bytes [rows * K * element], as a file would map them.
class Linear {
 public:
  Linear(const std::string& format, int32_t K, std::vector<Bytes> weights,
         std::vector<nb::object> biases, const std::string& isa, int threads)
      : kernels_(select_kernels(isa.c_str())),
        pool_(threads),
        format_(format_from_name(format.c_str())),
        K_(K),
        weights_(std::move(weights)) {
    size_t row = static_cast<size_t>(K) * weight_bytes(format_);
    if (K < 1 || biases.size() != weights_.size())
      throw std::invalid_argument("expected K >= 1 and one bias, or None, per weight");
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (weights_[i].size() % row != 0)
        throw std::invalid_argument("weight " + std::to_string(i) + " has " +
                                    std::to_string(weights_[i].size()) +
                                    " bytes: expected a multiple of " + std::to_string(row));
      auto rows = static_cast<int32_t>(weights_[i].size() / row);
      const float* bias = nullptr;
      if (!biases[i].is_none()) {
        biases_.push_back(nb::cast<Vector>(biases[i]));
        if (biases_.back().size() != static_cast<size_t>(rows))
          throw std::invalid_argument("a bias has another length than its weight has rows");
        bias = biases_.back().data();
      }
      parts_.push_back({weights_[i].data(), bias, rows});
      rows_ += rows;
    }
  }

  // x [M, K] -> y [M, sum of rows]
  Output call(const Matrix& x) {
    if (x.shape(1) != static_cast<size_t>(K_))
      throw std::invalid_argument("x has " + std::to_string(x.shape(1)) + " columns: expected " +
                                  std::to_string(K_));
    const size_t M = x.shape(0);
    auto* y = new float[std::max<size_t>(M * static_cast<size_t>(rows_), 1)];
    nb::capsule owner(y, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    {
      nb::gil_scoped_release release;
      run(x.data(), static_cast<int32_t>(M), y);
    }
    return Output(y, {M, static_cast<size_t>(rows_)}, owner);
  }

  // Seconds of one pass of M rows over all of `linears`, one after the other, in the first's pool.
  static std::vector<double> time(const std::vector<Linear*>& linears, int32_t M, int repeats) {
    if (linears.empty() || M < 1) throw std::invalid_argument("expected linears and num_rows >= 1");
    nb::gil_scoped_release release;
    size_t in = 0, out = 0;
    for (const Linear* one : linears) {
      in = std::max(in, input_bytes(one->format_, one->K_));
      out = std::max(out, static_cast<size_t>(one->rows_));
    }
    auto x = make_aligned<char>(static_cast<size_t>(M) * in);
    auto y = make_aligned<float>(static_cast<size_t>(M) * out);
    std::memset(x.get(), 0, static_cast<size_t>(M) * in);
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) {
      auto start = Clock::now();
      for (const Linear* one : linears) one->multiply(linears[0]->pool_, x.get(), M, y.get());
      seconds.push_back(seconds_since(start));
    }
    return seconds;
  }

 private:
  void run(const float* x, int32_t M, float* y) {
    const size_t stride = input_bytes(format_, K_);
    auto prepared = make_aligned<char>(static_cast<size_t>(M) * stride);
    pool_.parallel(M, [&](int64_t m, int) {
      prepare_input(kernels_, format_, K_, x + m * K_, prepared.get() + m * stride);
    });
    multiply(pool_, prepared.get(), M, y);
  }

  void multiply(Pool& pool, const void* x, int32_t M, float* y) const {
    LinearJob job = {parts_.data(), static_cast<int32_t>(parts_.size()), K_, x, M, y, rows_};
    linear(kernels_, pool, format_, &job, 1);
  }

  const Kernels& kernels_;
  Pool pool_;
  Format format_;
  int32_t K_;
  std::vector<Bytes> weights_;
  std::vector<Vector> biases_;
  std::vector<LinearPart> parts_;
  int64_t rows_ = 0;
};

// Bytes per second of the best of several read loops over memory that no cache holds.
double read_bandwidth(double seconds, int threads) {
  constexpr size_t kItem = 1 << 20, kItems = 256;
  const Kernels& kernels = select_kernels();
  Pool pool(threads);
  nb::gil_scoped_release release;
  auto data = make_aligned<char>(kItem * kItems);
  pool.parallel(kItems, [&](int64_t item, int) {
    for (size_t i = 0; i < kItem; i += 8)
      std::memcpy(data.get() + item * kItem + i, &item, sizeof(item));
  });
  double best = 0;
  std::atomic<uint64_t> sink{0};
  auto begin = Clock::now();
  for (int variant = 0;
       variant < kernels.linear->num_read_variants || seconds_since(begin) < seconds; ++variant) {
    auto start = Clock::now();
    pool.parallel(kItems, [&](int64_t item, int) {
      sink += kernels.linear->read(variant % kernels.linear->num_read_variants,
                                   data.get() + item * kItem, kItem);
    });
    best = std::max(best, static_cast<double>(kItem * kItems) / seconds_since(start));
  }
  return best;
}

// Operations per second of loops that touch registers only; a multiply-add counts as two.
double peak_flops(const std::string& kind, double seconds, int threads) {
  if (kind != "float32" && kind != "bfloat16")
    throw std::invalid_argument("kind is '" + kind + "': expected float32 or bfloat16");
  const Kernels& kernels = select_kernels();
  Pool pool(threads);
  nb::gil_scoped_release release;
  double best = 0;
  for (auto begin = Clock::now(); seconds_since(begin) < seconds;) {
    std::vector<double> operations(static_cast<size_t>(pool.threads()) * 8);
    auto start = Clock::now();
    pool.parallel(static_cast<int64_t>(operations.size()), [&](int64_t item, int) {
      operations[static_cast<size_t>(item)] = kernels.linear->peak(kind == "bfloat16", 100'000);
    });
    double total = 0;
    for (double count : operations) total += count;
    best = std::max(best, total / seconds_since(start));
  }
  return best;
}

// Runs `jobs` jobs of `items` items; each item adds one to its cell: [items] counts.
std::vector<int64_t> pool_counts(int threads, int64_t items, int jobs) {
  Pool pool(threads);
  std::vector<int64_t> counts(static_cast<size_t>(items));
  nb::gil_scoped_release release;
  for (int job = 0; job < jobs; ++job)
    pool.parallel(items, [&](int64_t item, int) { ++counts[static_cast<size_t>(item)]; });
  return counts;
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("isa_names", &isa_names, "Instruction sets that this machine can run, the best last.");
  m.def(
      "selected_isa", [] { return std::string(select_kernels().name); },
      "The instruction set that runs: the best, or what VIVACE_ISA says.");
  m.def("default_threads", &default_threads,
        "Processors that this process may use: its affinity mask, cut by its cgroup's quota.");
  m.def("read_bandwidth", &read_bandwidth, nb::arg("seconds") = 1.0, nb::arg("threads") = 0,
        "Bytes per second of the best of several read loops over 256 MiB.");
  m.def("peak_flops", &peak_flops, nb::arg("kind"), nb::arg("seconds") = 0.5,
        nb::arg("threads") = 0,
        "Operations per second of a register-only loop: kind float32 or bfloat16.");
  m.def("pool_counts", &pool_counts, nb::arg("threads"), nb::arg("items"), nb::arg("jobs"),
        "How often each item of a pool's jobs ran: [items], for tests.");
  nb::class_<Linear>(m, "Linear", "One linear group on its own, for tests and benchmarks.")
      .def(nb::init<const std::string&, int32_t, std::vector<Bytes>, std::vector<nb::object>,
                    const std::string&, int>(),
           nb::arg("format"), nb::arg("in_features"), nb::arg("weights"), nb::arg("biases"),
           nb::arg("isa") = "", nb::arg("threads") = 1)
      .def("__call__", &Linear::call, nb::arg("x"), "x [M, K] float32 -> [M, N] float32.");
  m.def("time_linears", &Linear::time, nb::arg("linears"), nb::arg("num_rows"), nb::arg("repeats"),
        "Seconds of each of `repeats` passes of num_rows rows over all linears.");
}

}  // namespace vivace
