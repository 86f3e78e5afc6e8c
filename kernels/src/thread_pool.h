// Parallel loops over the process's own worker threads, which sleep between calls.
#ifndef FAASMOE_THREAD_POOL_H
#define FAASMOE_THREAD_POOL_H

#include <cstdint>
#include <functional>

namespace fk {

// Run task(0) .. task(count - 1), on at most n_threads threads, the caller's included. Workers are
// started when they are first needed, and anew after a fork. One loop runs at a time; a loop that
// is started while another one runs is run by its caller alone.
void parallel(int64_t count, int32_t n_threads, const std::function<void(int64_t)> &task);

// While one lives, workers wait some microseconds for the next loop before they sleep. Held for
// the length of a call of the library, so that none spins between calls.
class Call {
 public:
  explicit Call(int32_t n_threads);
  ~Call();
  Call(const Call &) = delete;
  Call &operator=(const Call &) = delete;

 private:
  void *pool_;
};

}  // namespace fk
#endif
