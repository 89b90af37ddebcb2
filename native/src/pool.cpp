// A pool of threads that claim numbered work items: each those of its own share in order, which
// makes long runs through memory, then what is left of others'.
//
// A share's 64-bit word holds the job's number and how many items are left, so a thread that comes
// late can claim only an item that belongs to the job it sees; it is never waited for.
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

// Consecutive items that one thread claims first.
struct alignas(64) Share {
  std::atomic<uint64_t> word{0};  // number of the job << 32 | items left to claim
  int64_t end = 0;
};

struct Pool::State {
  std::vector<Share> shares;
  std::atomic<uint64_t> job{0};  // number of the newest
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<int32_t> sleepers{0};
  std::atomic<uint32_t> wakeups{0};
  std::atomic<bool> stopping{false};
  alignas(64) Task task = nullptr;
  void* context = nullptr;
  int64_t items = 0;
  std::mutex mutex;  // one job at a time
  std::vector<std::thread> workers;

  explicit State(int threads) : shares(static_cast<size_t>(threads)) {}
  void start();
  void stop();
  void work(uint64_t number, int thread);
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
    pool->state_ = new State(pool->threads_);
}

Pool::Pool(int threads) : threads_(threads == 0 ? default_threads() : threads) {
  if (threads_ < 1 || threads_ > 1024)
    throw std::invalid_argument("threads is " + std::to_string(threads) +
                                ": expected a whole number from 1 to 1024, or 0 for the default");
  state_ = new State(threads_);
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

void Pool::State::start() {
  for (int thread = 1; thread < static_cast<int>(shares.size()); ++thread)
    workers.emplace_back([this, thread] { run_worker(thread); });
}

void Pool::State::stop() {
  stopping.store(true);
  wakeups.fetch_add(1);
  wakeups.notify_all();
  for (std::thread& worker : workers) worker.join();
}

// Claims and runs items of job `number` until none is left.
void Pool::State::work(uint64_t number, int thread) {
  int64_t count = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    Share& share = shares[(static_cast<size_t>(thread) + i) % shares.size()];
    uint64_t seen = share.word.load(std::memory_order_acquire);
    while (seen >> 32 == number && (seen & kCountMask) != 0) {
      if (!share.word.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
      // The job cannot end before this item has, so its description stands still.
      task(context, share.end - static_cast<int64_t>(seen & kCountMask), thread);
      ++count;
      seen = share.word.load(std::memory_order_acquire);
    }
  }
  if (count == 0) return;
  const int64_t all = items;  // before the job can end
  if (done.fetch_add(count, std::memory_order_acq_rel) + count == all) done.notify_one();
}

// The number of a job that is not `last`, or `last` when the pool stops.
uint64_t Pool::State::await_job(uint64_t last) {
  auto ready = [&] { return job.load() != last || stopping.load(); };
  while (!spin(ready)) {
    uint32_t ticket = wakeups.load();
    sleepers.fetch_add(1);
    if (!ready()) wakeups.wait(ticket);
    sleepers.fetch_sub(1);
  }
  return stopping.load() ? last : job.load();
}

void Pool::State::run_worker(int thread) {
  FloatEnvironment environment;
  for (uint64_t last = 0;;) {
    last = await_job(last);
    if (stopping.load()) return;
    work(last, thread);
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
  if (state.workers.empty()) state.start();
  state.task = task;
  state.context = context;
  state.items = items;
  state.done.store(0);
  const uint64_t job = (state.job.load() + 1) & kCountMask;
  int64_t first = 0;
  for (int thread = 0; thread < threads_; ++thread) {
    const int64_t end = items * (thread + 1) / threads_;
    state.shares[thread].end = end;
    state.shares[thread].word.store(job << 32 | static_cast<uint64_t>(end - first));
    first = end;
  }
  state.job.store(job);
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
