// Random frames, and a router and a sandbox over one mailbox whose memory a third party overwrites,
// for a build with sanitizers.
//
//   fuzz calls SEED CASES
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "frame.h"
#include "layer_call.h"
#include "mailbox.h"
#include "sandbox_loop.h"

namespace {

std::mt19937_64 random_bits;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}
float normal() { return std::normal_distribution<float>()(random_bits); }

void require(bool condition, const char *what) {
  if (condition) return;
  std::printf("FAILED: %s (%s)\n", what, fk_calls_error());
  std::exit(1);
}

// An exactly sized copy, so that reading one byte too many is seen.
struct Bytes {
  std::unique_ptr<uint8_t[]> data;
  int64_t size;
  Bytes(const uint8_t *from, int64_t n) : data(new uint8_t[size_t(n)]), size(n) {
    if (n) std::memcpy(data.get(), from, size_t(n));
  }
};

std::vector<uint8_t> valid_request(fk::FrameHeader *header) {
  *header = {fk::kRequest, uint8_t(pick(1, 3)), uint8_t(pick(0, 1)), uint16_t(pick(0, 65535)),
             uint32_t(pick(1, 5)), 0, uint32_t(pick(1, 40))};
  header->n_pairs = uint32_t(pick(1, 12));
  std::vector<uint8_t> frame(size_t(header->frame_bytes()));
  fk::write_fields(frame.data(), *header);
  size_t n = header->n_pairs;
  std::vector<int32_t> row(n), expert(n);
  std::vector<float> weight(n);
  for (size_t i = 0; i < n; ++i) {
    row[i] = int32_t(i * header->n_rows / n);
    expert[i] = int32_t(pick(0, 100));
    weight[i] = normal();
  }
  std::memcpy(frame.data() + 32, row.data(), 4 * n);
  std::memcpy(frame.data() + 32 + 4 * n, expert.data(), 4 * n);
  std::memcpy(frame.data() + 32 + 8 * n, weight.data(), 4 * n);
  for (size_t i = 32 + 12 * n; i < frame.size(); ++i) frame[i] = uint8_t(pick(0, 255));
  fk::write_checksum(frame.data(), *header);
  return frame;
}

void fuzz_frames(int64_t cases) {
  fk::FrameRequest request;
  for (int64_t i = 0; i < cases; ++i) {
    fk::FrameHeader header;
    std::vector<uint8_t> frame = valid_request(&header);
    Bytes intact(frame.data(), int64_t(frame.size()));
    require(!fk::decode_request(intact.data.get(), intact.size, &request), "a valid request is accepted");
    Bytes flipped(frame.data(), int64_t(frame.size()));
    flipped.data[size_t(pick(0, flipped.size - 1))] ^= uint8_t(1 << pick(0, 7));
    require(fk::decode_request(flipped.data.get(), flipped.size, &request), "a flipped bit is found");
    Bytes cut(frame.data(), pick(0, int64_t(frame.size()) - 1));
    require(fk::decode_request(cut.data.get(), cut.size, &request), "a cut frame is found");
    // A header of random fields with a correct checksum.
    Bytes lying(frame.data(), int64_t(frame.size()));
    for (int64_t n = pick(1, 4); n > 0; --n) {
      uint32_t value = uint32_t(pick(0, 1) ? pick(0, 100) : random_bits());
      std::memcpy(lying.data.get() + 4 * pick(1, 6), &value, 4);
    }
    fk::decode_request(lying.data.get(), lying.size, &request);
    fk::FrameHeader answer = fk::response_header(header);
    fk::check_response(lying.data.get(), lying.size, answer);
    std::vector<uint8_t> response(size_t(answer.frame_bytes()), uint8_t(pick(0, 255)));
    fk::write_fields(response.data(), answer);
    fk::write_checksum(response.data(), answer);
    Bytes good(response.data(), int64_t(response.size()));
    require(!fk::check_response(good.data.get(), good.size, answer), "a valid response is accepted");
    good.data[size_t(pick(0, good.size - 1))] ^= uint8_t(1 << pick(0, 7));
    require(fk::check_response(good.data.get(), good.size, answer), "a flipped bit of a response is found");
  }
}

constexpr int64_t kHidden = 32, kInner = 16, kExperts = 6, kTopK = 2, kMaxRows = 8;
constexpr int32_t kSlots = 2, kSlotBytes = 8192;

struct Model {
  std::vector<float> first, down;
  std::vector<fk_matrix> first_table, down_table;
  fk_function_layer layer{};

  Model() : first(kExperts * 2 * kInner * kHidden), down(kExperts * kHidden * kInner) {
    for (float &w : first) w = normal() * 0.1f;
    for (float &w : down) w = normal() * 0.1f;
    for (int64_t e = 0; e < kExperts; ++e) {
      fk_matrix up{}, out{};
      up.n = 2 * kInner, up.k = kHidden, up.codes = first.data() + e * 2 * kInner * kHidden;
      out.n = kHidden, out.k = kInner, out.codes = down.data() + e * kHidden * kInner;
      first_table.push_back(up);
      down_table.push_back(out);
    }
    layer.hidden_size = kHidden;
    layer.n_experts = kExperts;
    layer.first = first_table.data();
    layer.down = down_table.data();
    layer.gating.is_gated = 1;
    layer.dtype = FK_FLOAT32;
  }
};

// What a third party does to the memory of a mailbox.
void overwrite(uint8_t *memory, int64_t size) {
  switch (pick(0, 3)) {
    case 0:  // a word of the header
      memory[pick(0, 400)] = uint8_t(pick(0, 255));
      break;
    case 1:  // a slot's description
      memory[4096 + pick(0, kSlots * 1024 - 1)] = uint8_t(pick(0, 255));
      break;
    case 2: {  // a slot's state
      uint32_t state = uint32_t(pick(0, 6));
      std::memcpy(memory + 4096 + pick(0, kSlots - 1) * 1024, &state, 4);
      break;
    }
    default:  // a frame
      memory[pick(8192, size - 1)] = uint8_t(pick(0, 255));
  }
}

// A mailbox of both sides in this process.
struct Pair {
  int fd, sockets[2];
  int64_t size = fk_mailbox_size(kSlots, kSlotBytes, kSlotBytes), handle, served = -1;
  uint8_t *memory;
  fk_calls *calls;
  fk_sandbox *sandbox;

  Pair(fk_calls *router, fk_sandbox *server) : calls(router), sandbox(server) {
    fd = memfd_create("fuzz", MFD_CLOEXEC);
    require(fd >= 0 && !ftruncate(fd, size) && !socketpair(AF_UNIX, SOCK_STREAM, 0, sockets), "resources");
    handle = fk_calls_add_mailbox(calls, fd, size, kSlots, kSlotBytes, kSlotBytes, sockets[0]);
    require(handle > 0, "a mailbox is made");
    memory = static_cast<uint8_t *>(mmap(nullptr, size_t(size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
  }
  ~Pair() {
    if (served > 0) fk_sandbox_close(sandbox, served);
    fk_calls_remove_mailbox(calls, handle);
    munmap(memory, size_t(size));
    close(fd);
    close(sockets[0]);
    close(sockets[1]);
  }
  void wait_until_served() const {
    auto *header = reinterpret_cast<fk::MailboxHeader *>(memory);
    for (int wait = 0; served > 0 && header->sandbox_state != fk::kServing && wait < 10000; ++wait) usleep(100);
  }
};

void fuzz_mailbox(int64_t cases) {
  Model model;
  double bounds[FK_N_SECONDS_BUCKETS - 1];
  for (int i = 0; i < FK_N_SECONDS_BUCKETS - 1; ++i) bounds[i] = 0.001 * (i + 1);
  fk_sandbox *sandbox = fk_sandbox_new(1, bounds);
  require(!fk_sandbox_publish(sandbox, "f", &model.layer, 1), "a function is published");
  fk_calls *calls = fk_calls_new();
  fk_calls_settings settings{};
  settings.store_dtype = FK_FLOAT32;
  settings.max_rows = kMaxRows;
  settings.n_threads = 1;
  settings.call_timeout_s = 0.05;
  for (int i = 0; i < FK_N_SIZE_CLASSES; ++i) settings.abandon_s[i] = 0.05;
  int64_t local = fk_calls_add_local(calls, &model.layer, 1);
  std::vector<int32_t> function_of(kExperts, 0);
  int64_t n_done = 0;
  for (int64_t i = 0; i < cases; ++i) {
    for (double &late_s : settings.hedge_s) late_s = pick(0, 1) ? 0.0 : 0.05;  // sent to the other one at once
    fk_calls_configure(calls, &settings);
    Pair first(calls, sandbox), second(calls, sandbox);
    bool is_hostile = pick(0, 3) > 0;
    if (is_hostile && pick(0, 3) == 0) overwrite(first.memory, first.size);
    for (Pair *pair : {&first, &second}) {
      pair->served = fk_sandbox_open(sandbox, pair->fd, pair->size);
      if (pair->served < 0) require(is_hostile && pair == &first, "an intact mailbox is served");
    }
    fk_route route{};
    route.n_mailboxes = pick(1, 2);
    route.mailboxes[0] = first.handle;
    route.mailboxes[1] = second.handle;
    route.id[0] = 'f';
    fk_layer_routes layer{function_of.data(), kExperts, &route, 1};
    require(!fk_calls_publish(calls, i, &layer, 1), "routes are published");
    if (!is_hostile) first.wait_until_served();
    second.wait_until_served();
    for (int64_t call = pick(1, 4); call > 0; --call) {
      int64_t rows = pick(1, kMaxRows);
      std::vector<float> hidden(size_t(rows * kHidden)), weight(size_t(rows * kTopK));
      std::vector<int64_t> index(size_t(rows * kTopK));
      for (float &x : hidden) x = normal();
      for (float &w : weight) w = normal();
      for (int64_t &e : index) e = pick(-1, kExperts);
      std::vector<float> out(hidden.size()), expected(hidden.size());
      int32_t status = fk_calls_begin(calls, 0, rows, kHidden, kTopK, hidden.data(), index.data(), weight.data());
      bool has_begun = status == FK_CALLS_DONE || status == FK_CALLS_LOCAL;  // local: without pairs
      require(is_hostile || has_begun, "an ordinary layer begins");
      if (!has_begun) continue;
      if (is_hostile)
        for (int64_t n = pick(0, 3); n > 0; --n) overwrite(first.memory, first.size);
      if (pick(0, 7) == 0) fk_calls_release_memory(calls);
      if (pick(0, 7) == 0) fk_sandbox_retract(sandbox, "f"), fk_sandbox_publish(sandbox, "f", &model.layer, 1);
      status = fk_calls_finish(calls, 0, out.data());
      require(status >= 0, "finish is no error");
      if (status != FK_CALLS_DONE || is_hostile) continue;
      fk_route here = route;
      here.local = local;
      here.n_mailboxes = 0;
      fk_layer_routes own{function_of.data(), kExperts, &here, 1};
      fk_calls_publish(calls, i, &own, 1);
      status = fk_calls_begin(calls, 0, rows, kHidden, kTopK, hidden.data(), index.data(), weight.data());
      require(status == FK_CALLS_LOCAL, "a layer of this process begins");
      require(!fk_calls_finish(calls, 0, expected.data()), "finish");
      fk_calls_publish(calls, i, &layer, 1);
      require(!std::memcmp(out.data(), expected.data(), 4 * out.size()), "mailbox and local function agree");
      ++n_done;
    }
  }
  require(n_done > 0, "some layers are computed over the mailbox");
  fk_calls_free(calls);
  fk_sandbox_free(sandbox);
}

}  // namespace

void fuzz_calls(uint64_t seed, int64_t cases) {
  random_bits.seed(seed);
  fuzz_frames(cases);
  fuzz_mailbox(cases / 10);
  std::printf("%lld cases\n", (long long)cases);
}
