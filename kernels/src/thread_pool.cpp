#include "thread_pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace fk {
namespace {

// How long a thread waits before it sleeps: at the end of a loop, and within a call for its next loop.
constexpr std::chrono::microseconds kLoopEnd{20}, kNextLoop{50};
constexpr int kPausesPerLook = 16;  // at the clock

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits a moment until `is_done`, so that a thread that is about to be needed does not go to sleep.
template <class F>
bool spin_until(F &&is_done, std::chrono::microseconds time) {
  auto end = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (is_done()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Pool {
 public:
  void run(int64_t count, int32_t n_threads, const std::function<void(int64_t)> &task) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    int n_workers = int(std::min<int64_t>(n_threads, count) - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(n_workers);
      task_ = &task;
      count_ = count;
      next_ = 0;
      n_wanted_ = n_workers;
      ++round_;
    }
    wake_.notify_all();
    work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      n_wanted_ = 0;  // who has not begun need not
    }
    if (!spin_until([&] { return n_running_ == 0; }, kLoopEnd)) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [&] { return n_running_ == 0; });
    }
    task_ = nullptr;
    if (has_failed_.exchange(false)) throw std::bad_alloc();
  }

  void begin_call() { ++n_calls_; }
  void end_call() { --n_calls_; }

 private:
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
        work();
        lock.lock();
        if (--n_running_ == 0) done_.notify_one();
        lock.unlock();
        spin_until([&] { return n_calls_ == 0 || round_ != seen; }, kNextLoop);
        lock.lock();
      } while (round_ != seen && n_wanted_ > 0);
    }
  }

  void work() {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*task_)(i);
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
