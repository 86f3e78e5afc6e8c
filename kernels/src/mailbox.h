// A mailbox: shared memory in which one router leaves request frames for one sandbox, and finds the
// responses. Layout, states and who may write what: docs/wire.md, "Mailboxes".
#ifndef FAASMOE_MAILBOX_H
#define FAASMOE_MAILBOX_H

#include <stdint.h>

#include <atomic>
#include <cstddef>

namespace fk {

constexpr uint32_t kMailboxMagic = 0x58424d46;  // "FMBX"
constexpr uint32_t kMailboxVersion = 2;
constexpr uint32_t kMaxSlots = 16;
constexpr uint32_t kMaxSlotBytes = 8 << 20;  // of one frame
constexpr int64_t kPageBytes = 4096;
constexpr int kMaxFunctionsPerFrame = 8;
constexpr int kFunctionIdBytes = 64;  // padded with zeros

// Who may change a slot's state: the router FREE -> REQUEST, REQUEST -> FREE (cancelled),
// BUSY -> ABANDONED, DONE -> FREE; the sandbox REQUEST -> BUSY, BUSY -> DONE, ABANDONED -> FREE.
enum SlotState : uint32_t { kFree = 0, kRequestReady = 1, kBusy = 2, kDone = 3, kAbandoned = 4 };

enum MailboxState : uint32_t { kOpening = 0, kServing = 1, kDraining = 2 };

// How the sandbox answered. Everything but kOk leaves the call to HTTP.
enum SlotStatus : uint32_t {
  kOk = 0,
  kNotOrdinary = 1,      // a layer, mode or number of rows that Python computes
  kUnknownFunction = 2,  // not attached, or without native kernels
  kStoreChanged = 3,     // the store's file was written since it was verified
  kSandboxDraining = 4,
  kExpired = 5,          // the deadline passed before the computation began
  kBadFrame = 6,         // `detail` names the field
  kFailed = 7,           // the kernel library rejected the call or ran out of memory
};

struct MailboxHeader {
  uint32_t magic, version, n_slots, request_bytes, response_bytes;
  alignas(64) std::atomic<uint32_t> doorbell;       // incremented with each request; the sandbox waits on it
  alignas(64) std::atomic<uint32_t> sandbox_waits;  // 1 while the sandbox waits, so that it must be woken
  alignas(64) std::atomic<uint32_t> sandbox_state;  // MailboxState
};

struct Slot {
  std::atomic<uint32_t> state;         // SlotState; the router waits on it
  std::atomic<uint32_t> router_waits;  // 1 while the router waits
  // Written by the router before REQUEST.
  uint32_t sequence, request_bytes, n_functions, reserved;
  uint64_t table_version;
  uint64_t deadline_ns;  // CLOCK_MONOTONIC
  char ids[kMaxFunctionsPerFrame][kFunctionIdBytes];
  // Written by the sandbox before DONE.
  alignas(64) uint32_t answered_sequence;
  uint32_t status, response_bytes, compute_us;
  char detail[32];
};

static_assert(sizeof(MailboxHeader) <= kPageBytes, "the header fits in the first page");
constexpr int64_t kSlotStride = 1024;
static_assert(sizeof(Slot) <= kSlotStride, "a slot's description fits its stride");
static_assert(offsetof(Slot, ids) == 40 && offsetof(Slot, answered_sequence) == 576, "as in docs/wire.md");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "shared between processes");

// One process's mapping of a mailbox; sizes are a private copy that the peer cannot change.
class Mailbox {
 public:
  Mailbox() = default;
  ~Mailbox();
  Mailbox(const Mailbox &) = delete;
  Mailbox &operator=(const Mailbox &) = delete;

  // Maps the memory of `fd`, which stays open. The creator writes the header. Returns nullptr, or
  // what is wrong with the memory.
  const char *create(int fd, int64_t size_bytes, uint32_t n_slots, uint32_t request_bytes,
                     uint32_t response_bytes);
  const char *open(int fd, int64_t size_bytes);

  MailboxHeader &header() const { return *reinterpret_cast<MailboxHeader *>(base_); }
  Slot &slot(uint32_t i) const { return *reinterpret_cast<Slot *>(base_ + kPageBytes + i * kSlotStride); }
  uint8_t *request(uint32_t i) const { return base_ + data_offset_ + i * stride_; }
  uint8_t *response(uint32_t i) const { return request(i) + request_bytes; }

  // Frees the pages of all frames; they read as zeros when used again. Only while no slot is in use.
  void release_pages() const;

  uint32_t n_slots = 0, request_bytes = 0, response_bytes = 0;

  static int64_t size_bytes(uint32_t n_slots, uint32_t request_bytes, uint32_t response_bytes);

 private:
  const char *map(int fd, int64_t size_bytes);
  void set_sizes(uint32_t slots, uint32_t request, uint32_t response);

  uint8_t *base_ = nullptr;
  int64_t size_ = 0, data_offset_ = 0, stride_ = 0;
};

// Waits until `*word` is not `expected`, a wake, a signal or the timeout; < 0 waits without one.
void futex_wait(std::atomic<uint32_t> *word, uint32_t expected, int64_t timeout_ns);
void futex_wake(std::atomic<uint32_t> *word);

int64_t monotonic_ns();

}  // namespace fk
#endif
