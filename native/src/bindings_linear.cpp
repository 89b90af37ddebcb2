// What Python sees of the kernels and the machine: for tests, doctor and benchmarks.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

#include "bindings.h"

namespace vivace {

namespace {

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::numpy, float, nb::ndim<2>>;
using Clock = std::chrono::steady_clock;

constexpr size_t kPage = 2 << 20;  // a huge one

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(kPage)); }
};
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned>;

template <class T>
Aligned<T> make_aligned(size_t count) {
  void* memory = ::operator new(std::max<size_t>(count, 1) * sizeof(T), std::align_val_t(kPage));
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

// A linear group on its own.
class TestLinear {
 public:
  // `parts`: (packed, bias or None)
  TestLinear(const nb::list& parts, const std::string& isa, int threads)
      : kernels_(select_kernels(isa.c_str())), pool_(threads) {
    require(nb::len(parts) > 0, "expected at least one matrix");
    for (nb::handle part : parts) {
      matrices_.push_back(bind_packed(part[0]));
      const PackedMatrix& matrix = matrices_.back();
      const float* bias = nullptr;
      if (!nb::object(part[1]).is_none()) {
        biases_.push_back(nb::cast<Vector>(part[1]));
        require(biases_.back().size() == static_cast<size_t>(matrix.rows),
                "a bias has another length than its weight has rows");
        bias = biases_.back().data();
      }
      require(matrix.K == matrices_[0].K, "the matrices read inputs of different lengths");
      linear_.parts.push_back({matrix.format, matrix.raw.data(), bias, matrix.rows});
    }
    linear_.in_features = matrices_[0].K;
    share_input({&linear_});
  }

  // x [M, K] -> y [M, sum of rows]
  Output call(const Matrix& x) {
    const auto K = static_cast<size_t>(linear_.in_features);
    require(x.shape(1) == K,
            "x has " + std::to_string(x.shape(1)) + " columns: expected " + std::to_string(K));
    const size_t M = x.shape(0), N = linear_.out_features();
    auto* y = new float[std::max<size_t>(M * N, 1)];
    nb::capsule owner(y, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    {
      nb::gil_scoped_release release;
      auto prepared = make_aligned<char>(M * linear_.input.bytes);
      FloatEnvironment environment;
      for (size_t m = 0; m < M; ++m)
        prepare_row(kernels_, linear_, x.data() + m * K, prepared.get() + m * linear_.input.bytes);
      multiply(pool_, prepared.get(), static_cast<int32_t>(M), y);
    }
    return Output(y, {M, N}, owner);
  }

  // Row `index` of the first matrix: [K]
  Output row(int64_t index) {
    const PackedMatrix& matrix = matrices_[0];
    require(index >= 0 && index < matrix.rows, "there is no row " + std::to_string(index));
    auto* y = new float[static_cast<size_t>(matrix.K)];
    nb::capsule owner(y, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    FloatEnvironment environment;
    read_row(kernels_, matrix.format, matrix.K, matrix.raw.data(), index, 1.0f, y);
    return Output(y, {1, static_cast<size_t>(matrix.K)}, owner);
  }

  // Seconds of one pass of M rows over all of `linears`, one after the other, in the first's pool.
  static std::vector<double> time(const std::vector<TestLinear*>& linears, int32_t M, int repeats) {
    if (linears.empty() || M < 1) throw std::invalid_argument("expected linears and num_rows >= 1");
    nb::gil_scoped_release release;
    size_t in = 0, out = 0;
    for (const TestLinear* one : linears) {
      in = std::max(in, one->linear_.input.bytes);
      out = std::max(out, static_cast<size_t>(one->linear_.out_features()));
    }
    auto x = make_aligned<char>(static_cast<size_t>(M) * in);
    auto y = make_aligned<float>(static_cast<size_t>(M) * out);
    std::memset(x.get(), 0, static_cast<size_t>(M) * in);
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) {
      auto start = Clock::now();
      for (const TestLinear* one : linears) one->multiply(linears[0]->pool_, x.get(), M, y.get());
      seconds.push_back(seconds_since(start));
    }
    return seconds;
  }

 private:
  void multiply(Pool& pool, const void* x, int32_t M, float* y) const {
    LinearJob job = linear_.job(x, M, y, linear_.out_features());
    linear(kernels_, pool, &job, 1);
  }

  const Kernels& kernels_;
  Pool pool_;
  Linear linear_;
  std::vector<PackedMatrix> matrices_;
  std::vector<Vector> biases_;
};

// Bytes per second of the best of several read loops over memory that no cache holds.
double read_bandwidth(double seconds, int threads) {
  constexpr size_t kItem = 1 << 20, kItems = 256;
  const Kernels& kernels = select_kernels();
  Pool pool(threads);
  nb::gil_scoped_release release;
  auto data = make_aligned<char>(kItem * kItems);
#if defined(__linux__)
  madvise(data.get(), kItem * kItems, MADV_HUGEPAGE);  // the most that the memory gives
#endif
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
  if (kind != "float32" && kind != "bfloat16" && kind != "int8")
    throw std::invalid_argument("kind is '" + kind + "': expected float32, bfloat16 or int8");
  const Kernels& kernels = select_kernels();
  Pool pool(threads);
  nb::gil_scoped_release release;
  double best = 0;
  for (auto begin = Clock::now(); seconds_since(begin) < seconds;) {
    std::vector<double> operations(static_cast<size_t>(pool.threads()) * 8);
    auto start = Clock::now();
    pool.parallel(static_cast<int64_t>(operations.size()), [&](int64_t item, int) {
      operations[static_cast<size_t>(item)] =
          kind == "int8" ? kernels.integer->peak(20'000)
                         : kernels.linear->peak(kind == "bfloat16", 100'000);
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

PackedMatrix bind_packed(nb::handle packed) {
  PackedMatrix matrix;
  const auto kernel = nb::cast<std::string>(packed.attr("kernel"));
  const nb::object shape = packed.attr("shape");
  matrix.rows = nb::cast<int32_t>(shape[0]);
  matrix.K = nb::cast<int32_t>(shape[1]);
  matrix.raw = nb::cast<PackedMatrix::Raw>(packed.attr("raw"), false);
  size_t bytes = 0;
  try {
    matrix.format = format_from_name(kernel);
    bytes = matrix_bytes(matrix.format, matrix.rows, matrix.K);
  } catch (const std::invalid_argument& error) {
    throw NativeError(error.what());
  }
  require(matrix.rows > 0 && matrix.K > 0 && matrix.raw.size() == bytes,
          "a matrix [" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.K) + "] as " +
              kernel + " has " + std::to_string(matrix.raw.size()) + " bytes: expected " +
              std::to_string(bytes));
  return matrix;
}

bool is_finite(const Kernels& kernels, Pool& pool, const PackedMatrix& matrix) {
  const Format& format = matrix.format;
  const int64_t unit = unit_outputs(format), num_units = (matrix.rows + unit - 1) / unit;
  const size_t bytes = unit_bytes(format, matrix.K);
  const int64_t per_item = std::max<int64_t>(1, (512 << 10) / static_cast<int64_t>(bytes));
  std::atomic<bool> finite = true;
  pool.for_rows(num_units, per_item, [&](int64_t index, int) {
    const uint8_t* at = matrix.raw.data() + static_cast<size_t>(index) * bytes;
    const bool holds = is_float(format)     ? kernels.ops->is_finite(format.storage, at, matrix.K)
                       : is_decoded(format) ? kernels.table->is_finite(format, matrix.K, at)
                                            : has_finite_scales(format, matrix.K, at);
    if (!holds) finite = false;
  });
  return finite;
}

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
        "Operations per second of a register-only loop: kind float32, bfloat16 or int8.");
  m.def("pool_counts", &pool_counts, nb::arg("threads"), nb::arg("items"), nb::arg("jobs"),
        "How often each item of a pool's jobs ran: [items], for tests.");
  nb::class_<TestLinear>(m, "Linear", "One linear group on its own, for tests and benchmarks.")
      .def(nb::init<const nb::list&, const std::string&, int>(), nb::arg("parts"),
           nb::arg("isa") = "", nb::arg("threads") = 1)
      .def("__call__", &TestLinear::call, nb::arg("x"), "x [M, K] float32 -> [M, N] float32.")
      .def("row", &TestLinear::row, nb::arg("index"), "A row of the first matrix: [1, K] float32.");
  m.def("time_linears", &TestLinear::time, nb::arg("linears"), nb::arg("num_rows"),
        nb::arg("repeats"),
        "Seconds of each of `repeats` passes of num_rows rows over all linears.");
}

}  // namespace vivace
