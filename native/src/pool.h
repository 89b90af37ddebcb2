// A pool of threads that claim numbered work items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace vivace {

enum class Denormals : bool { zero, kept };

// The one floating-point environment of all kernels: round to nearest even, denormals are zero on
// input and output, no traps. The caller's environment comes back at the end of the scope.
// With denormals kept it is numpy's.
class FloatEnvironment {
 public:
  explicit FloatEnvironment(Denormals denormals = Denormals::zero);
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

// Processors that this process may use: its affinity mask, cut by its cgroup's quota. At least 1.
int default_threads();

class Pool {
 public:
  // `task` must not throw. `thread` is in [0, threads()) and unique among running tasks: an index
  // for scratch memory. Nothing else may depend on it.
  using Task = void (*)(void* context, int64_t item, int thread);

  explicit Pool(int threads = 0);  // 0: default_threads(); 1: no other thread is ever made
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Runs task(context, i, thread) once for each i in [0, items), items < 2^32; returns when all are
  // done. Every thread has an equal share of consecutive items, which it starts in ascending order,
  // and then takes from others' shares; the caller takes part. Sets the FloatEnvironment in every
  // thread. Calls from several threads queue up; a task must not call it.
  void parallel(int64_t items, Task task, void* context);

  // The same for any callable f(int64_t item, int thread).
  template <class F>
  void parallel(int64_t items, F&& f) {
    parallel(
        items,
        [](void* context, int64_t item, int thread) {
          (*static_cast<std::remove_reference_t<F>*>(context))(item, thread);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

  // f(row, thread) for each of `rows` rows, several to an item.
  template <class F>
  void for_rows(int64_t rows, int64_t rows_per_item, F f) {
    parallel((rows + rows_per_item - 1) / rows_per_item, [&](int64_t item, int thread) {
      const int64_t end = std::min(rows, (item + 1) * rows_per_item);
      for (int64_t row = item * rows_per_item; row < end; ++row) f(row, thread);
    });
  }

 private:
  struct State;
  int threads_;
  State* state_ = nullptr;
  Pool* next_ = nullptr;  // list of living pools, for the child of a fork

  static void after_fork_in_child();
  friend struct PoolList;
};

}  // namespace vivace
