#include "limited_memory.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "expert_residency.h"
#include "mailbox.h"
#include "router_ops.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

namespace fk {
namespace {

constexpr int64_t kLookNs = 100000000;         // between looks at what was read
constexpr int64_t kReadingNs = 10000000000;    // that a process is taken to read, after it was seen to
constexpr int64_t kLookedBytes = 1 << 20;      // read between two looks that are no chance
constexpr int64_t kAheadBytes = 16 << 20;      // that are read ahead of the products, which keep the disk busy
constexpr int64_t kTurnBytes = 4 << 20;        // to be read that are computed together
constexpr uintptr_t kRequestBytes = 512 << 10; // of one request to read; the kernel may ignore what is beyond

std::atomic<int64_t> next_look_ns{0}, reading_until_ns{0}, looked_bytes{0};

// Bytes that this process has read from the disk, page faults and reading ahead included.
int64_t disk_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t(usage.ru_inblock) * 512;
}

int64_t parameter_bytes(int32_t dtype) {
  return dtype == FK_P_FLOAT32 ? 4 : dtype == FK_P_BFLOAT16 || dtype == FK_P_FLOAT16 ? 2 : 1;
}

int64_t code_bytes(const fk_matrix &m) {
  int64_t size = m.n * m.k;
  switch (m.scheme) {
    case FK_W_FLOAT32: return 4 * size;
    case FK_W_BFLOAT16:
    case FK_W_FLOAT16: return 2 * size;
    case FK_W_INT8:
    case FK_W_FP8: return size;
    default: return size / 2;
  }
}

int64_t scale_bytes(const fk_matrix &m) {
  int64_t rows_per_scale = std::max(1, m.group_rows), columns = m.group ? m.group : m.k;
  return (m.n + rows_per_scale - 1) / rows_per_scale * ((m.k + columns - 1) / columns) * parameter_bytes(m.scale_dtype);
}

// Where the codes and scales of a matrix lie.
template <class F>
void for_parts(const fk_matrix &m, F &&f) {
  auto part = [&](const void *lower, const void *upper, int64_t bytes) {
    if (!lower) return;
    f(reinterpret_cast<uintptr_t>(lower), upper ? bytes / 2 : bytes);
    if (upper) f(reinterpret_cast<uintptr_t>(upper), bytes / 2);
  };
  part(m.codes, m.codes_upper, code_bytes(m));
  part(m.scales, m.scales_upper, scale_bytes(m));
}

uintptr_t page_bytes() {
  static const uintptr_t size = uintptr_t(sysconf(_SC_PAGESIZE));
  return size;
}

// Starts to read a matrix, and does not wait for it. What cannot be read is found out by who touches it.
void read_ahead(const fk_matrix &matrix) {
  for_parts(matrix, [](uintptr_t address, int64_t bytes) {
    uintptr_t at = address & ~(page_bytes() - 1);
    for (uintptr_t end = address + uintptr_t(bytes); at < end; at += kRequestBytes)
      madvise(reinterpret_cast<void *>(at), std::min(kRequestBytes, end - at), MADV_WILLNEED);
  });
}

// Bytes of a matrix that are not in memory; 0 if this process may not know, as of a file of others.
int64_t missing_bytes(const fk_matrix &matrix, std::vector<unsigned char> *pages) {
  int64_t total = 0;
  for_parts(matrix, [&](uintptr_t address, int64_t bytes) {
    uintptr_t begin = address & ~(page_bytes() - 1), size = address + uintptr_t(bytes) - begin;
    pages->resize((size + page_bytes() - 1) / page_bytes());
    if (mincore(reinterpret_cast<void *>(begin), size, pages->data())) return;
    total += std::count_if(pages->begin(), pages->end(), [](unsigned char page) { return !(page & 1); });
  });
  return total * int64_t(page_bytes());
}

// Drops a matrix from memory, but for pages that it shares with others and that other processes map.
void drop(const fk_matrix &matrix) {
  for_parts(matrix, [](uintptr_t address, int64_t bytes) {
    uintptr_t begin = (address + page_bytes() - 1) & ~(page_bytes() - 1);
    uintptr_t end = (address + uintptr_t(bytes)) & ~(page_bytes() - 1);
    if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_PAGEOUT);
  });
}

// The experts that this process computes, and where they are.
class ResidentExperts {
 public:
  std::mutex mutex;  // held by the call that uses the rest

  void begin(int64_t layer, const fk_matrix *first, const fk_matrix *down, int64_t n) {
    uses_.clear();
    for (int64_t i = 0; i < n; ++i) {
      auto id = uint64_t(reinterpret_cast<uintptr_t>(first[i].codes));
      places_[id] = {first[i], down[i]};
      uses_.push_back({id, uint64_t(layer), weights_bytes(first[i]) + weights_bytes(down[i])});
    }
    policy_.begin(double(monotonic_ns()) / 1e9, uses_.data(), n, &plan_);
    for (uint64_t id : plan_.forgotten) places_.erase(id);
    drop_evicted();
    missed_bytes_ = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (plan_.is_read[size_t(i)]) continue;
      int64_t missing = missing_bytes(first[i], &pages_) + missing_bytes(down[i], &pages_);
      plan_.is_read[size_t(i)] = missing > 0;
      missed_bytes_ += missing;
    }
  }

  void finish() {
    policy_.finish(double(monotonic_ns()) / 1e9, missed_bytes_, &plan_);
    drop_evicted();
  }

  bool is_read(int64_t i) const { return plan_.is_read[size_t(i)]; }
  bool is_dropped(int64_t i) const { return plan_.is_dropped[size_t(i)]; }
  int64_t bytes(int64_t i) const { return uses_[size_t(i)].bytes; }

 private:
  static int64_t weights_bytes(const fk_matrix &m) {
    int64_t total = 0;
    for_parts(m, [&](uintptr_t, int64_t bytes) { total += bytes; });
    return total;
  }

  void drop_evicted() {
    for (uint64_t id : plan_.evicted) {
      auto found = places_.find(id);
      if (found == places_.end()) continue;
      drop(found->second.first);
      drop(found->second.second);
    }
  }

  ExpertResidency policy_;
  ResidencyPlan plan_;
  std::vector<ExpertUse> uses_;
  std::unordered_map<uint64_t, std::pair<fk_matrix, fk_matrix>> places_;
  std::vector<unsigned char> pages_;  // scratch memory
  int64_t missed_bytes_ = 0;          // of the current call
};

ResidentExperts &resident_experts() {
  static ResidentExperts experts;
  return experts;
}

// Whether this process has read from the disk in the last seconds; safe from any thread.
bool is_reading_from_disk(int64_t now_ns) {
  int64_t look_ns = next_look_ns.load(std::memory_order_relaxed);
  if (now_ns >= look_ns && next_look_ns.compare_exchange_strong(look_ns, now_ns + kLookNs)) {
    int64_t bytes = disk_bytes();
    if (bytes - looked_bytes.exchange(bytes) >= kLookedBytes) reading_until_ns = now_ns + kReadingNs;
  }
  return now_ns < reading_until_ns.load(std::memory_order_relaxed);
}

// Whether the addresses of weights can be found; fk_experts says what is wrong with an argument.
bool is_usable(const fk_matrix *first, const fk_matrix *down, const fk_pairs *pairs) {
  if (!first || !down || !pairs || !pairs->group_sizes || !pairs->rows || !pairs->weights) return false;
  for (int64_t g = 0; g < pairs->n_groups; ++g)
    if (check_matrix("", first[g]) || check_matrix("", down[g])) return false;
  return pairs->n_groups > 0;
}

// The groups in turns, each with few experts that must be read; the next ones are being read meanwhile.
int32_t compute_in_turns(ResidentExperts &experts, const fk_matrix *first, const fk_matrix *down,
                         const fk_gating *gating, const fk_pairs &pairs, const void *x, int32_t x_dtype,
                         int64_t hidden_size, int64_t rows, float *out, int32_t n_threads) {
  int64_t ahead = 0, ahead_bytes = 0;  // groups that are being read, and their bytes that are not computed
  int32_t status = 0;
  for (int64_t g = 0, end = 0, pair = 0; g < pairs.n_groups && !status; g = end) {
    for (; ahead < pairs.n_groups && ahead_bytes < kAheadBytes; ++ahead) {
      if (!experts.is_read(ahead)) continue;
      read_ahead(first[ahead]);
      read_ahead(down[ahead]);
      ahead_bytes += experts.bytes(ahead);
    }
    int64_t turn_bytes = 0, n_pairs = 0;
    for (; end < ahead && turn_bytes < kTurnBytes; ++end) {
      turn_bytes += experts.is_read(end) ? experts.bytes(end) : 0;
      n_pairs += pairs.group_sizes[end];
    }
    fk_pairs turn{end - g, pairs.group_sizes + g, pairs.rows + pair, pairs.positions ? pairs.positions + pair : nullptr,
                  pairs.weights + pair, pairs.n_out};
    status = fk_experts(first + g, down + g, gating, &turn, x, x_dtype, hidden_size, rows, g ? FK_ADDED : FK_REDUCED,
                        out, FK_FLOAT32, hidden_size, n_threads);
    for (int64_t i = g; i < end; ++i) {
      if (!experts.is_dropped(i)) continue;
      drop(first[i]);
      drop(down[i]);
    }
    ahead_bytes -= turn_bytes;
    pair += n_pairs;
  }
  return status;
}

}  // namespace
}  // namespace fk

using namespace fk;

struct fk_residency {
  ExpertResidency policy;
  ResidencyPlan plan;

  int64_t copy_evicted(int64_t *to, int64_t max) const {
    std::copy_n(plan.evicted.begin(), std::min(max, int64_t(plan.evicted.size())), to);
    return int64_t(plan.evicted.size());
  }
};

#define FK_EXPORT __attribute__((visibility("default")))

extern "C" {

FK_EXPORT int32_t fk_layer_experts(int64_t layer, const fk_matrix *first, const fk_matrix *down,
                                   const fk_gating *gating, const fk_pairs *pairs, const void *x, int32_t x_dtype,
                                   int64_t hidden_size, int64_t rows, float *out, int32_t n_threads) {
  std::unique_lock<std::mutex> lock;
  if (is_reading_from_disk(monotonic_ns()) && is_usable(first, down, pairs))
    lock = std::unique_lock<std::mutex>(resident_experts().mutex, std::try_to_lock);
  if (!lock.owns_lock())  // all is in memory, or another thread computes, and this one reads what it needs
    return fk_experts(first, down, gating, pairs, x, x_dtype, hidden_size, rows, FK_REDUCED, out, FK_FLOAT32,
                      hidden_size, n_threads);
  ResidentExperts &experts = resident_experts();
  try {
    experts.begin(layer, first, down, pairs->n_groups);
    int32_t status = compute_in_turns(experts, first, down, gating, *pairs, x, x_dtype, hidden_size, rows, out,
                                      n_threads);
    experts.finish();
    return status;
  } catch (const std::bad_alloc &) {
    return FK_E_MEMORY;
  }
}

FK_EXPORT fk_residency *fk_residency_new(void) { return new fk_residency; }

FK_EXPORT void fk_residency_free(fk_residency *residency) { delete residency; }

FK_EXPORT int64_t fk_residency_begin(fk_residency *residency, double now_s, const int64_t *uses, int64_t n_uses,
                                     uint8_t *is_read, uint8_t *is_dropped, int64_t *evicted, int64_t max_evicted) {
  std::vector<ExpertUse> experts;
  for (int64_t i = 0; i < n_uses; ++i)
    experts.push_back({uint64_t(uses[3 * i]), uint64_t(uses[3 * i + 1]), uses[3 * i + 2]});
  residency->policy.begin(now_s, experts.data(), n_uses, &residency->plan);
  std::copy_n(residency->plan.is_read.begin(), n_uses, is_read);
  std::copy_n(residency->plan.is_dropped.begin(), n_uses, is_dropped);
  return residency->copy_evicted(evicted, max_evicted);
}

FK_EXPORT int64_t fk_residency_finish(fk_residency *residency, double now_s, int64_t missed_bytes, int64_t *evicted,
                                      int64_t max_evicted) {
  residency->policy.finish(now_s, missed_bytes, &residency->plan);
  return residency->copy_evicted(evicted, max_evicted);
}

FK_EXPORT int64_t fk_residency_capacity(const fk_residency *residency) {
  return residency->policy.capacity_bytes();
}

FK_EXPORT int64_t fk_residency_kept(const fk_residency *residency) { return residency->policy.kept_bytes(); }

}  // extern "C"
