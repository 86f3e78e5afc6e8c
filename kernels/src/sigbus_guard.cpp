// A mapped file that is truncated while it is read raises SIGBUS, which ends a process. Here the
// unreadable rest of a guarded range is replaced by zeros instead, and the range is marked as
// damaged. Whoever reads guarded memory checks the mark afterwards, and does not use what it read.
//
// Slots are claimed and freed with atomics only, because the handler may run on any thread at any
// time. Faults elsewhere go to the handler that was there before.
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

#include "faasmoe_kernels.h"
#include "function_weights.h"

#define FK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kMaxRanges = 8192;

struct Range {
  std::atomic<uintptr_t> begin{0};  // 0: free
  std::atomic<uintptr_t> end{0};
  int64_t file_offset = 0;
  int32_t damaged = 0;  // read by others without a call, hence plain memory
};

Range ranges[kMaxRanges];
std::atomic<bool> was_any_damaged{false};
std::atomic<int> used_ranges{0};  // slots above have never been used
pthread_mutex_t add_mutex = PTHREAD_MUTEX_INITIALIZER;
struct sigaction previous_action;
bool is_installed = false;

bool replace_rest(uintptr_t address) {
  const uintptr_t page = address & ~(static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)) - 1);
  const int n = used_ranges.load(std::memory_order_acquire);
  bool is_guarded = false;
  for (int i = 0; i < n; ++i) {
    const uintptr_t begin = ranges[i].begin.load(std::memory_order_acquire);
    const uintptr_t end = ranges[i].end.load(std::memory_order_acquire);
    if (begin == 0 || address < begin || address >= end) continue;
    __atomic_store_n(&ranges[i].damaged, 1, __ATOMIC_SEQ_CST);
    was_any_damaged.store(true);
    void *zeros = mmap(reinterpret_cast<void *>(page), end - page, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    is_guarded = is_guarded || zeros != MAP_FAILED;
  }
  return is_guarded;
}

void on_sigbus(int number, siginfo_t *info, void *context) {
  const int saved_errno = errno;
  const bool is_guarded = info->si_code == BUS_ADRERR &&
                          replace_rest(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = saved_errno;
  if (is_guarded) return;
  if (previous_action.sa_flags & SA_SIGINFO) {
    previous_action.sa_sigaction(number, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(number);
  } else {
    signal(SIGBUS, SIG_DFL);  // the instruction faults again, and ends the process
  }
}

bool install() {
  if (is_installed) return true;
  struct sigaction action = {};
  action.sa_sigaction = on_sigbus;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  is_installed = sigaction(SIGBUS, &action, &previous_action) == 0;
  return is_installed;
}

}  // namespace

bool fk::is_any_damaged() { return was_any_damaged.load(); }

bool fk::is_damaged(const void *address) {
  if (!was_any_damaged.load()) return false;
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  const int n = used_ranges.load(std::memory_order_acquire);
  for (int i = 0; i < n; ++i) {
    const uintptr_t begin = ranges[i].begin.load(std::memory_order_acquire);
    if (begin == 0 || at < begin || at >= ranges[i].end.load(std::memory_order_acquire)) continue;
    if (__atomic_load_n(&ranges[i].damaged, __ATOMIC_SEQ_CST)) return true;
  }
  return false;
}

FK_EXPORT int32_t fk_guard_add(void *address, int64_t size, int64_t file_offset) {
  pthread_mutex_lock(&add_mutex);
  int slot = -1;
  if (install() && address != nullptr && size > 0) {
    const int n = used_ranges.load(std::memory_order_relaxed);
    for (int i = 0; i < n && slot < 0; ++i) {
      if (ranges[i].begin.load(std::memory_order_relaxed) == 0) slot = i;
    }
    if (slot < 0 && n < kMaxRanges) slot = n;
  }
  if (slot >= 0) {
    Range &range = ranges[slot];
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    __atomic_store_n(&range.damaged, 0, __ATOMIC_SEQ_CST);
    range.file_offset = file_offset;
    range.end.store(begin + static_cast<uintptr_t>(size), std::memory_order_release);
    range.begin.store(begin, std::memory_order_release);
    if (slot >= used_ranges.load(std::memory_order_relaxed)) {
      used_ranges.store(slot + 1, std::memory_order_release);
    }
  }
  pthread_mutex_unlock(&add_mutex);
  return slot;
}

FK_EXPORT int32_t *fk_guard_damaged(int32_t slot) { return &ranges[slot].damaged; }

FK_EXPORT int32_t fk_guard_restore(int32_t slot, int32_t descriptor) {
  Range &range = ranges[slot];
  const uintptr_t begin = range.begin.load(std::memory_order_acquire);
  const uintptr_t end = range.end.load(std::memory_order_acquire);
  __atomic_store_n(&range.damaged, 0, __ATOMIC_SEQ_CST);
  void *mapped = mmap(reinterpret_cast<void *>(begin), end - begin, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_FIXED, descriptor, range.file_offset);
  if (mapped != MAP_FAILED) return 0;
  __atomic_store_n(&range.damaged, 1, __ATOMIC_SEQ_CST);
  return errno;
}

FK_EXPORT void fk_guard_remove(int32_t slot) {
  ranges[slot].begin.store(0, std::memory_order_release);
}
