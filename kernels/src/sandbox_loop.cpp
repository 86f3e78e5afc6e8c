#include "sandbox_loop.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <unordered_map>

#include "mailbox.h"

namespace fk {
namespace {

thread_local char calls_error[256] = "";

constexpr size_t kMaxMailboxes = 64;
const uint8_t kFrameDtypes[] = {kFloat32, kBfloat16, kFloat16};  // by enum fk_dtype

// A function that stays published while it exists.
using Functions = std::unordered_map<std::string, std::shared_ptr<FunctionWeights>>;

}  // namespace

int32_t set_calls_error(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(calls_error, sizeof calls_error, format, arguments);
  va_end(arguments);
  return -1;
}

}  // namespace fk

using namespace fk;

struct fk_sandbox {
  struct Served {
    Mailbox mailbox;
    std::atomic<bool> is_closing{false}, has_ended{false};
    std::atomic<int64_t> n_frames{0};
    std::thread thread;
  };

  // Functions of one frame; they cannot be retracted while it exists.
  struct Lease {
    Lease() = default;
    Lease(const Lease &) = delete;
    Lease &operator=(const Lease &) = delete;
    fk_sandbox *sandbox = nullptr;
    std::shared_ptr<FunctionWeights> functions[kMaxFunctionsPerFrame];
    int n = 0;
    ~Lease() {
      if (!n) return;
      std::lock_guard<std::mutex> lock(sandbox->functions_mutex);
      for (int i = 0; i < n; ++i) --functions[i]->n_running;
      sandbox->retractable.notify_all();
    }
  };

  int32_t n_threads;
  double bounds_s[FK_N_SECONDS_BUCKETS - 1];
  std::atomic<bool> is_draining{false};

  std::mutex functions_mutex;  // guards the two below, and n_running of functions
  std::condition_variable retractable;
  Functions functions;

  std::mutex compute_mutex;  // one frame at a time has the sandbox's threads

  std::mutex mailboxes_mutex;
  std::map<int64_t, std::unique_ptr<Served>> mailboxes;
  int64_t next_handle = 1;

  std::mutex counters_mutex;
  fk_sandbox_counters counters{};

  void serve(Served *served);
  void answer(Served *served, uint32_t index, FrameRequest *request, ComputeScratch *scratch);
  SlotStatus compute(Served *served, uint32_t index, FrameRequest *request, ComputeScratch *scratch,
                     char *detail, uint32_t *response_size);
  bool lease(const Slot &slot, Lease *lease);
  void count(const FrameRequest &request, const Lease &lease, double seconds);
};

// Serves one mailbox until it is closed.
void fk_sandbox::serve(Served *served) {
  sigset_t all;  // signals are for Python's threads
  sigfillset(&all);
  // But those that an instruction raises: sigbus_guard.cpp handles a file that is truncated.
  for (int number : {SIGBUS, SIGSEGV, SIGFPE, SIGILL}) sigdelset(&all, number);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  pthread_setname_np(pthread_self(), "mailbox");
  MailboxHeader &header = served->mailbox.header();
  FrameRequest request;
  ComputeScratch scratch;
  while (!served->is_closing) {
    uint32_t doorbell = header.doorbell.load();
    bool was_busy = false;
    for (uint32_t i = 0; i < served->mailbox.n_slots; ++i) {
      uint32_t expected = kRequestReady;
      if (!served->mailbox.slot(i).state.compare_exchange_strong(expected, kBusy)) continue;
      was_busy = true;
      {
        std::lock_guard<std::mutex> lock(counters_mutex);
        ++counters.n_running;
      }
      answer(served, i, &request, &scratch);
      std::lock_guard<std::mutex> lock(counters_mutex);
      --counters.n_running;
    }
    if (was_busy) continue;
    header.sandbox_waits.store(1);
    if (header.doorbell.load() == doorbell && !served->is_closing)
      futex_wait(&header.doorbell, doorbell, -1);
    header.sandbox_waits.store(0);
  }
  header.sandbox_state.store(kDraining);
  served->has_ended = true;
}

void fk_sandbox::answer(Served *served, uint32_t index, FrameRequest *request, ComputeScratch *scratch) {
  Slot &slot = served->mailbox.slot(index);
  char detail[sizeof slot.detail] = "";
  uint32_t sequence = slot.sequence, response_size = 0;
  int64_t start_ns = monotonic_ns();
  SlotStatus status = kFailed;
  try {
    status = compute(served, index, request, scratch, detail, &response_size);
  } catch (const std::bad_alloc &) {
    std::snprintf(detail, sizeof detail, "memory: could not be allocated");
  }
  {
    std::lock_guard<std::mutex> lock(counters_mutex);
    ++counters.statuses[status];
  }
  ++served->n_frames;
  slot.answered_sequence = sequence;
  slot.status = status;
  slot.response_bytes = response_size;
  slot.compute_us = uint32_t((monotonic_ns() - start_ns) / 1000);
  std::memcpy(slot.detail, detail, sizeof detail);
  uint32_t expected = kBusy;
  if (!slot.state.compare_exchange_strong(expected, kDone)) {
    slot.state.store(kFree);  // abandoned: nobody reads the answer
    return;
  }
  if (slot.router_waits.load()) futex_wake(&slot.state);
}

bool fk_sandbox::lease(const Slot &slot, Lease *lease) {
  uint32_t n = *const_cast<const volatile uint32_t *>(&slot.n_functions);
  if (n < 1 || n > uint32_t(kMaxFunctionsPerFrame)) return false;
  std::lock_guard<std::mutex> lock(functions_mutex);
  lease->sandbox = this;
  for (uint32_t i = 0; i < n; ++i) {
    char id[kFunctionIdBytes + 1] = "";
    std::memcpy(id, slot.ids[i], kFunctionIdBytes);
    auto found = functions.find(id);
    if (found == functions.end()) return false;
    lease->functions[lease->n++] = found->second;
    ++found->second->n_running;
  }
  return true;
}

// Computes the frame in a slot; on kOk the response frame is complete.
SlotStatus fk_sandbox::compute(Served *served, uint32_t index, FrameRequest *request, ComputeScratch *scratch,
                               char *detail, uint32_t *response_size) {
  const Slot &slot = served->mailbox.slot(index);
  if (is_draining) return kSandboxDraining;
  if (int64_t(slot.deadline_ns) < monotonic_ns()) return kExpired;
  auto bad = [&](const char *field) {
    std::snprintf(detail, sizeof slot.detail, "%s", field);
    return kBadFrame;
  };
  uint32_t size = *const_cast<const volatile uint32_t *>(&slot.request_bytes);
  if (size > served->mailbox.request_bytes) return bad("frame");
  if (const char *field = decode_request(served->mailbox.request(index), size, request)) return bad(field);
  const FrameHeader &header = request->header;
  if (header.mode != kReduced) return kNotOrdinary;
  Lease held;
  if (!lease(slot, &held)) return kUnknownFunction;
  const LayerWeights *parts[kMaxFunctionsPerFrame];
  for (int i = 0; i < held.n; ++i) {
    parts[i] = held.functions[i]->find(header.layer);
    if (!parts[i]) return bad("layer");
    if (header.dtype != kFrameDtypes[parts[i]->dtype]) return bad("dtype");
    if (int64_t(header.hidden_size) != parts[i]->hidden_size) return bad("hidden_size");
  }
  CallPairs pairs{header.n_rows, header.n_pairs, request->pair_row, request->pair_expert, request->pair_weight};
  int64_t n_sums = place_sums(parts, held.n, pairs, scratch);
  if (n_sums < 0) return bad("pair_expert");
  FrameHeader response = response_header(header, n_sums);
  if (response.frame_bytes() > int64_t(served->mailbox.response_bytes)) return kNotOrdinary;
  uint8_t *out = served->mailbox.response(index);
  auto *sums = reinterpret_cast<float *>(out + kFrameHeaderBytes);
  std::lock_guard<std::mutex> computing(compute_mutex);
  int64_t start_ns = monotonic_ns();
  switch (compute_sums(parts, held.n, pairs, n_sums, request->rows, sums, n_threads, scratch)) {
    case kTooManyRows: return kNotOrdinary;
    case kComputeFailed:
      std::snprintf(detail, sizeof slot.detail, "%s", fk_last_error());
      return kFailed;
    case kComputed: break;
  }
  // Checked afterwards, so that the bytes that were read are covered.
  for (int i = 0; i < held.n; ++i)
    if (parts[i]->is_changed()) return kStoreChanged;
  write_fields(out, response);
  write_checksum(out, response);
  *response_size = uint32_t(response.frame_bytes());
  count(*request, held, double(monotonic_ns() - start_ns) / 1e9);
  return kOk;
}

void fk_sandbox::count(const FrameRequest &request, const Lease &held, double seconds) {
  for (int i = 0; i < held.n; ++i) ++held.functions[i]->n_frames;
  int bucket = int(std::lower_bound(bounds_s, std::end(bounds_s), seconds) - bounds_s);
  std::lock_guard<std::mutex> lock(counters_mutex);
  ++counters.frames;
  counters.rows += request.header.n_rows;
  ++counters.seconds_buckets[bucket];
  counters.seconds_sum += seconds;
}

#define FK_EXPORT __attribute__((visibility("default")))

extern "C" {

FK_EXPORT const char *fk_calls_error(void) { return calls_error; }

FK_EXPORT fk_sandbox *fk_sandbox_new(int32_t n_threads, const double *buckets_s) {
  auto *sandbox = new fk_sandbox;
  sandbox->n_threads = n_threads < 1 ? 1 : n_threads;
  std::copy(buckets_s, buckets_s + FK_N_SECONDS_BUCKETS - 1, sandbox->bounds_s);
  return sandbox;
}

FK_EXPORT void fk_sandbox_free(fk_sandbox *sandbox) {
  for (;;) {
    int64_t handle;
    {
      std::lock_guard<std::mutex> lock(sandbox->mailboxes_mutex);
      if (sandbox->mailboxes.empty()) break;
      handle = sandbox->mailboxes.begin()->first;
    }
    fk_sandbox_close(sandbox, handle);
  }
  delete sandbox;
}

FK_EXPORT int32_t fk_sandbox_publish(fk_sandbox *sandbox, const char *id, const fk_function_layer *layers,
                                     int64_t n_layers) {
  if (!id || !*id || std::strlen(id) > size_t(kFunctionIdBytes))
    return set_calls_error("id: got \"%s\", expected 1 to %d characters", id ? id : "", kFunctionIdBytes);
  const char *error = nullptr;
  auto function = copy_function(id, layers, n_layers, &error);
  if (!function) return set_calls_error("%s", error);
  fk_sandbox_retract(sandbox, id);
  std::lock_guard<std::mutex> lock(sandbox->functions_mutex);
  sandbox->functions[id] = std::move(function);
  return 0;
}

FK_EXPORT void fk_sandbox_retract(fk_sandbox *sandbox, const char *id) {
  std::unique_lock<std::mutex> lock(sandbox->functions_mutex);
  auto found = sandbox->functions.find(id);
  if (found == sandbox->functions.end()) return;
  auto function = found->second;
  sandbox->functions.erase(found);
  sandbox->retractable.wait(lock, [&] { return function->n_running == 0; });
}

FK_EXPORT int64_t fk_sandbox_function_frames(fk_sandbox *sandbox, const char *id) {
  std::lock_guard<std::mutex> lock(sandbox->functions_mutex);
  auto found = sandbox->functions.find(id);
  return found == sandbox->functions.end() ? 0 : found->second->n_frames.load();
}

FK_EXPORT int64_t fk_sandbox_open(fk_sandbox *sandbox, int32_t fd, int64_t size_bytes) {
  auto served = std::make_unique<fk_sandbox::Served>();
  if (const char *error = served->mailbox.open(fd, size_bytes)) return set_calls_error("mailbox: %s", error);
  std::lock_guard<std::mutex> lock(sandbox->mailboxes_mutex);
  if (sandbox->mailboxes.size() >= kMaxMailboxes)
    return set_calls_error("mailbox: got one more than the %zu allowed", kMaxMailboxes);
  fk_sandbox::Served *raw = served.get();
  served->mailbox.header().sandbox_state.store(sandbox->is_draining ? kDraining : kServing);
  try {
    served->thread = std::thread([sandbox, raw] { sandbox->serve(raw); });
  } catch (const std::system_error &) {
    return set_calls_error("mailbox: no thread could be started");
  }
  int64_t handle = sandbox->next_handle++;
  sandbox->mailboxes[handle] = std::move(served);
  return handle;
}

FK_EXPORT int64_t fk_sandbox_close(fk_sandbox *sandbox, int64_t mailbox) {
  std::unique_ptr<fk_sandbox::Served> served;
  {
    std::lock_guard<std::mutex> lock(sandbox->mailboxes_mutex);
    auto found = sandbox->mailboxes.find(mailbox);
    if (found == sandbox->mailboxes.end()) return -1;
    served = std::move(found->second);
    sandbox->mailboxes.erase(found);
  }
  MailboxHeader &header = served->mailbox.header();
  served->is_closing = true;
  while (!served->has_ended) {  // again and again, whatever the peer writes to the doorbell
    header.doorbell.fetch_add(1);
    futex_wake(&header.doorbell);
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  served->thread.join();
  return served->n_frames;
}

FK_EXPORT int64_t fk_sandbox_mailbox_frames(fk_sandbox *sandbox, int64_t mailbox) {
  std::lock_guard<std::mutex> lock(sandbox->mailboxes_mutex);
  auto found = sandbox->mailboxes.find(mailbox);
  return found == sandbox->mailboxes.end() ? -1 : found->second->n_frames.load();
}

FK_EXPORT void fk_sandbox_drain(fk_sandbox *sandbox) {
  sandbox->is_draining = true;
  std::lock_guard<std::mutex> lock(sandbox->mailboxes_mutex);
  for (auto &entry : sandbox->mailboxes) entry.second->mailbox.header().sandbox_state.store(kDraining);
}

FK_EXPORT void fk_sandbox_read_counters(fk_sandbox *sandbox, fk_sandbox_counters *out) {
  {
    std::lock_guard<std::mutex> lock(sandbox->counters_mutex);
    *out = sandbox->counters;
  }
  std::lock_guard<std::mutex> lock(sandbox->mailboxes_mutex);
  out->n_mailboxes = int64_t(sandbox->mailboxes.size());
}

}  // extern "C"
