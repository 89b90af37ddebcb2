// A pool of threads that claim numbered work items in any order.
//
// One 64-bit word holds the job's number and how many items are left, so a thread that comes late
// can claim only an item that belongs to the job it sees; it is never waited for.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vivace {

// ---------------------------------------------------------------- floating-point environment

namespace {

#if defined(__x86_64__)
constexpr uint64_t kKernelControl = 0x9fc0;  // DAZ, FTZ, all traps masked, round to nearest
constexpr uint64_t kPlainControl = 0x1f80;
uint64_t read_control() {
  return _mm_getcsr();
}
void write_control(uint64_t control) {
  _mm_setcsr(static_cast<unsigned>(control));
}
void relax() {
  _mm_pause();
}
#elif defined(__aarch64__)
constexpr uint64_t kKernelControl = 1u << 24;  // FZ
constexpr uint64_t kPlainControl = 0;
uint64_t read_control() {
  uint64_t control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control));
  return control;
}
void write_control(uint64_t control) {
  __asm__ volatile("msr fpcr, %0" : : "r"(control));
}
void relax() {
  __asm__ volatile("yield");
}
#else
constexpr uint64_t kKernelControl = 0, kPlainControl = 0;
uint64_t read_control() {
  return 0;
}
void write_control(uint64_t) {}
void relax() {}
#endif

}  // namespace

FloatEnvironment::FloatEnvironment(Denormals denormals) : saved_(read_control()) {
  const uint64_t wanted = denormals == Denormals::kept ? kPlainControl : kKernelControl;
  if (saved_ != wanted) write_control(wanted);
}

FloatEnvironment::~FloatEnvironment() {
  write_control(saved_);
}

// ---------------------------------------------------------------- how many threads

namespace {

// Processors' worth of time that a cgroup file grants, or 0 if it sets no limit.
double quota_of(const std::string& directory) {
  std::string quota;
  double period = 0;
  if (std::ifstream file(directory + "/cpu.max"); file >> quota >> period)  // version 2
    return quota == "max" || period <= 0 ? 0 : std::atof(quota.c_str()) / period;
  std::ifstream quota_file(directory + "/cpu.cfs_quota_us");  // version 1
  std::ifstream period_file(directory + "/cpu.cfs_period_us");
  double value = 0;
  if (quota_file >> value && period_file >> period && value > 0 && period > 0)
    return value / period;
  return 0;
}

// The tightest quota on the way from this process's cgroup to the root, or 0.
double cgroup_quota() {
  double tightest = 0;
  auto consider = [&](const std::string& directory) {
    double quota = quota_of(directory);
    if (quota > 0 && (tightest == 0 || quota < tightest)) tightest = quota;
  };
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && controllers.find("cpu") == std::string::npos) continue;
    std::string root = controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      consider(root + path);
      if (path.rfind('/') == std::string::npos) break;
    }
  }
  return tightest;
}

}  // namespace

int default_threads() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) count = CPU_COUNT(&set);
  if (double quota = cgroup_quota(); quota > 0)
    count = std::min(count, static_cast<int>(std::ceil(quota)));
#endif
  return std::max(count, 1);
}

// ---------------------------------------------------------------- the pool

struct Pool::State {
  std::atomic<uint64_t> word{0};  // number of the job << 32 | items left to claim
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<int32_t> sleepers{0};
  std::atomic<uint32_t> wakeups{0};
  std::atomic<bool> stopping{false};
  alignas(64) Task task = nullptr;
  void* context = nullptr;
  int64_t items = 0;
  std::mutex mutex;  // one job at a time
  std::vector<std::thread> workers;

  void start(int threads);
  void stop();
  int64_t work(uint64_t job, int thread);
  void run_worker(int thread);
  uint64_t await_job(uint64_t last);
};

namespace {

constexpr auto kSpin = std::chrono::microseconds(50);
constexpr uint64_t kCountMask = 0xffffffffu;

// Spins until ready() or until kSpin has passed; returns whether it is ready.
template <class Ready>
bool spin(Ready ready) {
  auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() - start < kSpin);
  return ready();
}

}  // namespace

// Living pools, so that the child of a fork can forget threads it does not have.
struct PoolList {
  std::mutex mutex;
  Pool* first = nullptr;

  static PoolList& get() {
    static PoolList* list = [] {
      auto* made = new PoolList;  // never destroyed: pools may outlive static objects
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); },
                     [] {
                       Pool::after_fork_in_child();
                       get().mutex.unlock();
                     });
      return made;
    }();
    return *list;
  }
};

void Pool::after_fork_in_child() {
  // The old state may be locked or in use by threads that are gone: it is abandoned, not freed.
  for (Pool* pool = PoolList::get().first; pool != nullptr; pool = pool->next_)
    pool->state_ = new State;
}

Pool::Pool(int threads) : threads_(threads == 0 ? default_threads() : threads), state_(new State) {
  if (threads_ < 1 || threads_ > 1024) {
    delete state_;
    throw std::invalid_argument("threads is " + std::to_string(threads) +
                                ": expected a whole number from 1 to 1024, or 0 for the default");
  }
  PoolList& list = PoolList::get();
  std::lock_guard lock(list.mutex);
  next_ = list.first;
  list.first = this;
}

Pool::~Pool() {
  {
    PoolList& list = PoolList::get();
    std::lock_guard lock(list.mutex);
    Pool** link = &list.first;
    while (*link != this) link = &(*link)->next_;
    *link = next_;
  }
  state_->stop();
  delete state_;
}

void Pool::State::start(int threads) {
  for (int thread = 1; thread < threads; ++thread)
    workers.emplace_back([this, thread] { run_worker(thread); });
}

void Pool::State::stop() {
  stopping.store(true);
  wakeups.fetch_add(1);
  wakeups.notify_all();
  for (std::thread& worker : workers) worker.join();
}

// Claims and runs items of `job` until none is left; returns how many it ran.
int64_t Pool::State::work(uint64_t job, int thread) {
  int64_t count = 0;
  uint64_t seen = word.load(std::memory_order_acquire);
  while (seen >> 32 == job && (seen & kCountMask) != 0) {
    if (!word.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
    // The job cannot end before this item has, so its description stands still.
    task(context, items - static_cast<int64_t>(seen & kCountMask), thread);
    ++count;
    seen = word.load(std::memory_order_acquire);
  }
  if (count > 0 && done.fetch_add(count, std::memory_order_acq_rel) + count == items)
    done.notify_one();
  return count;
}

// The number of a job that is not `last` and has items left, or `last` when the pool stops.
uint64_t Pool::State::await_job(uint64_t last) {
  auto ready = [&] {
    uint64_t seen = word.load();
    return (seen >> 32 != last && (seen & kCountMask) != 0) || stopping.load();
  };
  while (!spin(ready)) {
    uint32_t ticket = wakeups.load();
    sleepers.fetch_add(1);
    if (!ready()) wakeups.wait(ticket);
    sleepers.fetch_sub(1);
  }
  return stopping.load() ? last : word.load() >> 32;
}

void Pool::State::run_worker(int thread) {
  FloatEnvironment environment;
  for (uint64_t job = 0;;) {
    uint64_t next = await_job(job);
    if (stopping.load()) return;
    job = next;
    work(job, thread);
  }
}

void Pool::parallel(int64_t items, Task task, void* context) {
  if (items <= 0) return;
  FloatEnvironment environment;
  if (threads_ == 1 || items == 1) {
    // Thread index 0 belongs to whoever holds the mutex.
    std::lock_guard lock(state_->mutex);
    for (int64_t item = 0; item < items; ++item) task(context, item, 0);
    return;
  }
  State& state = *state_;
  std::lock_guard lock(state.mutex);
  if (state.workers.empty()) state.start(threads_);
  state.task = task;
  state.context = context;
  state.items = items;
  state.done.store(0);
  uint64_t job = ((state.word.load() >> 32) + 1) & kCountMask;
  state.word.store(job << 32 | static_cast<uint64_t>(items));
  if (state.sleepers.load() > 0) {
    state.wakeups.fetch_add(1);
    state.wakeups.notify_all();
  }
  state.work(job, 0);
  auto finished = [&] { return state.done.load(std::memory_order_acquire) == items; };
  while (!spin(finished)) {
    int64_t seen = state.done.load();
    if (seen != items) state.done.wait(seen);
  }
}

}  // namespace vivace
