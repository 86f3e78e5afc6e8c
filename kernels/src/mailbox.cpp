#include "mailbox.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <new>

namespace fk {
namespace {

int64_t align_page(int64_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

bool are_sizes_valid(uint32_t slots, uint32_t request, uint32_t response) {
  return slots >= 1 && slots <= kMaxSlots && request >= 64 && request <= kMaxSlotBytes && response >= 64 &&
         response <= kMaxSlotBytes && request % 64 == 0 && response % 64 == 0;
}

}  // namespace

Mailbox::~Mailbox() {
  if (base_) munmap(base_, size_t(size_));
}

int64_t Mailbox::size_bytes(uint32_t slots, uint32_t request, uint32_t response) {
  return align_page(kPageBytes + slots * kSlotStride) + int64_t(slots) * (int64_t(request) + response);
}

void Mailbox::set_sizes(uint32_t slots, uint32_t request, uint32_t response) {
  n_slots = slots;
  request_bytes = request;
  response_bytes = response;
  stride_ = int64_t(request) + response;
  data_offset_ = align_page(kPageBytes + slots * kSlotStride);
}

const char *Mailbox::map(int fd, int64_t size) {
  void *base = mmap(nullptr, size_t(size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) return "the memory cannot be mapped";
  base_ = static_cast<uint8_t *>(base);
  size_ = size;
  return nullptr;
}

void Mailbox::release_pages() const {
  for (uint32_t i = 0; i < n_slots; ++i)
    if (slot(i).state.load() != kFree) return;
  madvise(base_ + data_offset_, size_t(int64_t(n_slots) * stride_) / kPageBytes * kPageBytes, MADV_REMOVE);
}

const char *Mailbox::create(int fd, int64_t size, uint32_t slots, uint32_t request, uint32_t response) {
  if (!are_sizes_valid(slots, request, response) || size < size_bytes(slots, request, response))
    return "sizes are out of range";
  if (const char *error = map(fd, size)) return error;
  set_sizes(slots, request, response);
  auto *header = new (base_) MailboxHeader{};
  header->magic = kMailboxMagic;
  header->version = kMailboxVersion;
  header->n_slots = slots;
  header->request_bytes = request;
  header->response_bytes = response;
  for (uint32_t i = 0; i < slots; ++i) new (&slot(i)) Slot{};
  return nullptr;
}

const char *Mailbox::open(int fd, int64_t size) {
  if (size < kPageBytes) return "the memory is smaller than its header";
  if (const char *error = map(fd, size)) return error;
  // Volatile: each field is read once, whatever the peer writes afterwards.
  const volatile MailboxHeader &shared = header();
  uint32_t magic = shared.magic, version = shared.version, slots = shared.n_slots;
  uint32_t request = shared.request_bytes, response = shared.response_bytes;
  if (magic != kMailboxMagic) return "magic: not a mailbox";
  if (version != kMailboxVersion) return "version: another version of the mailbox";
  if (!are_sizes_valid(slots, request, response) || size < size_bytes(slots, request, response))
    return "sizes are out of range";
  set_sizes(slots, request, response);
  return nullptr;
}

void futex_wait(std::atomic<uint32_t> *word, uint32_t expected, int64_t timeout_ns) {
  timespec timeout{timeout_ns / 1000000000, timeout_ns % 1000000000};
  syscall(SYS_futex, word, FUTEX_WAIT, expected, timeout_ns < 0 ? nullptr : &timeout, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t> *word) { syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0); }

int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1000000000 + now.tv_nsec;
}

}  // namespace fk
