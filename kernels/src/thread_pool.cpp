#include "thread_pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace fk {
namespace {

constexpr int kSpins = 400;  // pauses, some 10 microseconds

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a moment until `is_done`, so that a thread that is about to be needed does not go to sleep.
template <class F>
bool spin_until(F &&is_done) {
  for (int i = 0; i < kSpins; ++i) {
    if (is_done()) return true;
    pause();
  }
  return false;
}

thread_local const std::function<int32_t()> *n_others = nullptr;

// Workers that may join a loop: those that it has use for, without what others leave no core for.
int count_workers(int64_t count, int32_t n_threads) {
  int64_t n_useful = std::min<int64_t>(n_threads, count) - 1;
  if (!n_others) return int(n_useful);
  return int(std::max<int64_t>(0, std::min<int64_t>(n_useful, n_threads - 1 - (*n_others)())));
}

class Pool {
 public:
  void run(int64_t count, int32_t n_threads, const std::function<void(int64_t)> &task) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    int n_workers = count_workers(count, n_threads);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_ = 0;
      grow(n_workers);
      n_wanted_ = n_workers;
      ++round_;
    }
    if (n_workers) wake_.notify_all();
    work([&] {
      if (!n_others) return;
      int n_now = count_workers(count, n_threads);
      if (n_now > n_workers) add_workers(n_now - n_workers);
      n_workers = std::max(n_workers, n_now);
    });
    {
      std::lock_guard<std::mutex> lock(mutex_);
      n_wanted_ = 0;  // who has not begun need not
    }
    if (!spin_until([&] { return n_running_ == 0; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [&] { return n_running_ == 0; });
    }
    task_ = nullptr;
    if (has_failed_.exchange(false)) throw std::bad_alloc();
  }

  void begin_call() { ++n_calls_; }
  void end_call() { --n_calls_; }

 private:
  // Lets more workers join the loop.
  void add_workers(int n_workers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      n_wanted_ += n_workers;
      grow(n_wanted_ + n_running_);
    }
    wake_.notify_all();
  }

  void grow(int64_t n_workers) {
    while (int64_t(workers_.size()) < n_workers) {
      try {
        workers_.emplace_back([this] { serve(); });
        workers_.back().detach();
      } catch (const std::system_error &) {
        return;  // the caller and the workers that there are do the work
      }
    }
  }

  void serve() {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen && n_wanted_ > 0; });
      do {
        seen = round_;
        --n_wanted_;
        ++n_running_;
        lock.unlock();
        work([] {});
        lock.lock();
        if (--n_running_ == 0) done_.notify_one();
        lock.unlock();
        spin_until([&] { return n_calls_ == 0 || round_ != seen; });
        lock.lock();
      } while (round_ != seen && n_wanted_ > 0);
    }
  }

  // Does what is left of the loop, task by task; `between` is called before each.
  template <class F>
  void work(F &&between) {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < count_;) {
        between();
        (*task_)(i);
      }
    } catch (const std::bad_alloc &) {  // thrown by `run`, once nobody uses the task
      has_failed_ = true;
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<bool> has_failed_{false};
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)> *task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0}, round_{0};
  std::atomic<int> n_running_{0}, n_calls_{0};
  int n_wanted_ = 0;
};

// A forked child has none of its parent's workers: it gets a pool of its own. The parent's is
// leaked there, since its mutexes may be locked by threads that do not exist.
std::atomic<Pool *> pool{nullptr};
std::once_flag registered;

void reset_in_child() { pool.store(nullptr); }

Pool &get_pool() {
  std::call_once(registered, [] { pthread_atfork(nullptr, nullptr, reset_in_child); });
  Pool *current = pool.load();
  if (current) return *current;
  Pool *fresh = new Pool;
  if (pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

SharedCores::SharedCores(std::function<int32_t()> others) : n_others_(std::move(others)), outer_(n_others) {
  n_others = &n_others_;
}

SharedCores::~SharedCores() { n_others = outer_; }

Call::Call(int32_t n_threads) : pool_(n_threads > 1 ? &get_pool() : nullptr) {
  if (pool_) static_cast<Pool *>(pool_)->begin_call();
}

Call::~Call() {
  if (pool_) static_cast<Pool *>(pool_)->end_call();
}

void parallel(int64_t count, int32_t n_threads, const std::function<void(int64_t)> &task) {
  if (count <= 1 || n_threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  get_pool().run(count, n_threads, task);
}

}  // namespace fk
