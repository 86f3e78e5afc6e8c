#include "layer_call.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>
#include <fcntl.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <new>
#include <thread>

#include "float_convert.h"
#include "mailbox.h"
#include "sandbox_loop.h"

using namespace fk;

namespace {

constexpr int64_t kSliceNs = 2000000;  // of a wait, after which the peer's life is checked
constexpr int64_t kIdleNs = 100000000;     // after which the peer's life is checked before a call
constexpr unsigned kExiting = 4;  // PF_EXITING, among the flags in /proc/PID/stat
constexpr size_t kMaxEvents = 8192;  // the oldest are dropped if nobody takes them

const uint8_t kFrameDtypes[] = {kFloat32, kBfloat16, kFloat16};  // by enum fk_dtype

int64_t item_bytes(int32_t dtype) { return dtype == FK_FLOAT32 ? 4 : 2; }

// The process that listens at the other end of a Unix socket; 0 if it is in another namespace.
int peer_pid(int socket_fd) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  return getsockopt(socket_fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) == 0 ? credentials.pid : 0;
}

enum Life { kRuns, kStopped, kEnds };  // a stopped process answers nothing until it is continued

// A mailbox that this process made.
struct OwnMailbox {
  Mailbox memory;
  int64_t handle = 0;
  int socket = -1;
  int pid = 0;  // of the sandbox; 0 if it cannot be seen from here
  uint32_t sequence = 0;
  int64_t used_ns = 0;  // when its sandbox was last known to live
  std::atomic<bool> is_dead{false};
  std::atomic<bool> is_silent{false};  // it has not answered a call, and the events of that were not taken yet

  ~OwnMailbox() {
    if (socket >= 0) ::close(socket);
  }

  // Whether the sandbox closed its connection, or sent what it never sends there.
  bool check_dead() {
    pollfd event{socket, POLLIN | POLLRDHUP, 0};
    if (poll(&event, 1, 0) > 0 && event.revents) is_dead = true;
    return is_dead;
  }

  // What the sandbox's process does. One that was killed first gives back its memory, and then closes the
  // connection, milliseconds later.
  Life life() const {
    if (!pid) return kRuns;
    char path[32], text[512], state;
    std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int fd = ::open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return kRuns;
    ssize_t size = ::read(fd, text, sizeof text - 1);
    ::close(fd);
    if (size <= 0) return kRuns;
    text[size] = 0;
    const char *name_end = std::strrchr(text, ')');
    unsigned flags;
    if (!name_end || std::sscanf(name_end + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2) return kRuns;
    if (flags & kExiting || std::strchr("ZXx", state)) return kEnds;
    return std::strchr("Tt", state) ? kStopped : kRuns;
  }

  // A sandbox says so before it closes a mailbox: one that is dead and was serving was killed.
  bool was_serving() const { return memory.header().sandbox_state.load(std::memory_order_relaxed) == kServing; }

  bool is_usable() const { return !is_dead && was_serving(); }

  // Whether it may take another frame where there are other replicas, as far as can be seen in memory.
  bool is_free() const { return is_usable() && !is_silent && find_slot() >= 0; }

  // A free slot; -1 if there is none, or if the sandbox still owes an answer that came too late.
  int find_slot() const {
    int found = -1;
    for (uint32_t i = 0; i < memory.n_slots; ++i) {
      uint32_t state = memory.slot(i).state.load();
      if (state == kAbandoned) return -1;
      if (state == kFree && found < 0) found = int(i);
    }
    return found;
  }
};

struct Route {
  int64_t function = 0;
  std::shared_ptr<FunctionWeights> local;
  std::vector<std::shared_ptr<OwnMailbox>> mailboxes;
  char id[kFunctionIdBytes] = {};
};

struct LayerRoutes {
  std::vector<int32_t> function_of;
  std::vector<Route> routes;
  int64_t first_pairs = 0;  // index of the first function in the counts of pairs
};

struct Table {
  int64_t version = 0, n_routes = 0;
  std::vector<LayerRoutes> layers;
};

// What one sandbox, or this process, computes of a layer.
struct Part {
  std::shared_ptr<OwnMailbox> mailbox;  // null: this process
  uint32_t slot = 0, sequence = 0;
  bool is_sent = false, is_computed = false;
  bool is_repeated = false;  // sent after another sandbox did not answer
  FrameHeader header{};
  int64_t sent_ns = 0;
  double late_s = 0, abandon_s = 0;  // after how long to ask another replica, and nobody any more
  std::vector<int32_t> positions;  // of its functions in the layer's routes, ascending
  std::vector<int32_t> rows;       // of the batch, ascending
  std::vector<int32_t> pair_row, pair_expert;
  std::vector<float> pair_weight;
  int64_t n_sums = 0, n_added = 0;  // of its functions: one for each of their rows
  std::vector<uint8_t> input;       // of this process only, in the store's dtype
  std::vector<float> output;        // of this process only: the sums

  FrameHeader answer() const { return response_header(header, n_sums); }
  // Whether its frames fit into a mailbox.
  bool fits(const Mailbox &memory) const {
    return header.frame_bytes() <= int64_t(memory.request_bytes) &&
           answer().frame_bytes() <= int64_t(memory.response_bytes) &&
           int64_t(header.n_pairs) * header.row_bytes() <= kMaxPairsBytes;
  }
  const float *sums() const {
    if (!mailbox) return output.data();
    return reinterpret_cast<const float *>(mailbox->memory.response(slot) + kFrameHeaderBytes);
  }

  void reset() {
    mailbox.reset();
    is_sent = is_computed = is_repeated = false;
    n_sums = n_added = 0;
    positions.clear();
    rows.clear();
    pair_row.clear();
    pair_expert.clear();
    pair_weight.clear();
  }
};

// One row from one type to another.
void copy_row(const uint8_t *from, int32_t from_dtype, uint8_t *to, int32_t to_dtype, int64_t n) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, size_t(n * item_bytes(to_dtype)));
    return;
  }
  auto load = [&](int64_t i) {
    if (from_dtype == FK_FLOAT32) {
      float value;
      std::memcpy(&value, from + 4 * i, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, from + 2 * i, 2);
    return from_dtype == FK_BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
  };
  if (from_dtype == FK_FLOAT32 && to_dtype == FK_BFLOAT16) {
    for (int64_t i = 0; i < n; ++i) {
      float value;
      std::memcpy(&value, from + 4 * i, 4);
      uint16_t bits = to_bfloat16(value);
      std::memcpy(to + 2 * i, &bits, 2);
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    float value = load(i);
    if (to_dtype == FK_FLOAT32) {
      std::memcpy(to + 4 * i, &value, 4);
    } else {
      uint16_t bits = to_dtype == FK_BFLOAT16 ? to_bfloat16(value) : to_float16(value);
      std::memcpy(to + 2 * i, &bits, 2);
    }
  }
}

void add_row(float *total, const float *row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += row[i];
}

bool is_finite(const float *values, int64_t n) {
  uint32_t any = 0;  // the sign bit of a sum is set where the exponent is all ones
  for (int64_t i = 0; i < n; ++i) any |= (float_bits(values[i]) & 0x7f800000u) + 0x00800000u;
  return !(any >> 31);
}

int size_class(int64_t rows) {
  int bits = 0;
  for (; rows; rows >>= 1) ++bits;
  return std::min(bits, FK_N_SIZE_CLASSES - 1);
}

}  // namespace

struct fk_calls {
  std::mutex mutex;  // guards what other threads read or replace
  std::shared_ptr<const Table> table = std::make_shared<Table>();
  fk_calls_settings settings{};
  std::map<int64_t, std::shared_ptr<OwnMailbox>> mailboxes;
  std::map<int64_t, std::shared_ptr<FunctionWeights>> locals;
  int64_t next_handle = 1;
  std::vector<fk_function_totals> functions;
  std::vector<int64_t> pairs;
  fk_calls_totals totals{};
  std::deque<fk_call_event> events;
  int64_t n_faults = 0;  // among the events
  std::deque<double> layer_seconds;

  // Each is set before the other is read, so that pages are never freed below a frame.
  std::atomic<bool> is_in_layer{false}, is_releasing{false};

  // The layer between begin and finish; belongs to the calling thread.
  bool is_pending = false;
  std::shared_ptr<const Table> pending_table;
  fk_calls_settings now{};  // settings of this layer
  int64_t layer = 0, n_rows = 0, hidden_size = 0, start_ns = 0;
  const uint8_t *hidden = nullptr;  // of the caller, until the layer is finished
  int32_t hidden_dtype = FK_FLOAT32;
  std::vector<Part> parts;
  size_t n_parts = 0;
  std::vector<int32_t> part_of;      // by position in the layer's routes
  std::vector<int32_t> last_row;     // by position
  std::vector<int64_t> n_pairs_of, n_rows_of;  // by position
  std::vector<int64_t> rows_end;     // by position, in rows_of
  std::vector<int32_t> rows_of;      // of the batch, ascending, position after position
  std::vector<int32_t> n_rows_of_expert;
  std::vector<float> total;
  ComputeScratch scratch;
  uint64_t random = 0x9e3779b97f4a7c15u, round_robin = 0;

  int32_t begin(int64_t l, int64_t rows, int64_t h, int64_t k, const uint8_t *from, int32_t dtype,
                const int64_t *index, const float *weight);
  int32_t finish(int64_t l, uint8_t *out, int32_t dtype);

  bool count_pairs(const LayerRoutes &routes, int64_t rows, int64_t k, const int64_t *index, const float *weight);
  bool assign_parts(const LayerRoutes &routes);
  OwnMailbox *pick(const Route &route, std::shared_ptr<OwnMailbox> *picked);
  void set_limits(Part *part, const LayerRoutes &routes) const;
  bool send_elsewhere(size_t lost);
  bool divide(size_t lost, size_t first);
  Part &new_part();
  bool reserve_slots();
  bool is_callable(OwnMailbox *mailbox);
  void add_dead_event(const OwnMailbox &mailbox);
  void add_event(const fk_call_event &event);
  fk_call_event take_event();
  void collect_pairs(const LayerRoutes &routes, int64_t rows, int64_t k, const int64_t *index,
                     const float *weight);
  FrameHeader request(const Part &part) const;
  void encode(Part *part, const LayerRoutes &routes);
  void send(Part *part);
  void enter_layer();
  void release_memory();
  bool compute_local(Part *part);
  bool compute_locals();
  fk_call_end collect(size_t i, bool *is_elsewhere);
  fk_call_end wait(Part *part);
  fk_call_end verify(const Part &part, uint32_t *status, char *detail);
  void abandon(Part *part);
  void record(const Part &part, fk_call_end end, uint32_t status, const char *detail);
  void start_load(const LayerRoutes &routes);
  void end_load(bool is_done);
  int32_t general();
};

Part &fk_calls::new_part() {
  if (n_parts == parts.size()) parts.emplace_back();
  parts[n_parts].reset();
  return parts[n_parts++];
}

// Counts each function's pairs and rows; false if a weight is not finite, or an expert has too many.
bool fk_calls::count_pairs(const LayerRoutes &routes, int64_t rows, int64_t k, const int64_t *index,
                           const float *weight) {
  size_t n = routes.routes.size();
  n_pairs_of.assign(n, 0);
  n_rows_of.assign(n, 0);
  last_row.assign(n, -1);
  int64_t n_experts = int64_t(routes.function_of.size());
  n_rows_of_expert.assign(now.max_rows_per_expert ? size_t(n_experts) : 0, 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = r * k; j < (r + 1) * k; ++j) {
      if (index[j] < 0 || index[j] >= n_experts) continue;
      if (now.max_rows_per_expert && ++n_rows_of_expert[size_t(index[j])] > now.max_rows_per_expert) return false;
      if ((float_bits(weight[j]) & 0x7f800000u) == 0x7f800000u) return false;
      size_t position = size_t(routes.function_of[size_t(index[j])]);
      ++n_pairs_of[position];
      if (last_row[position] == int32_t(r)) continue;
      last_row[position] = int32_t(r);
      ++n_rows_of[position];
    }
  return true;
}

// Of two different replicas, the one with fewer functions of this layer; null if none can be called.
// Those that closed, or do not answer, are passed over where there are others.
OwnMailbox *fk_calls::pick(const Route &route, std::shared_ptr<OwnMailbox> *picked) {
  const auto &all = route.mailboxes;
  if (all.empty()) return nullptr;
  size_t free[FK_MAX_REPLICAS], n_free = 0;
  for (size_t i = 0; all.size() > 1 && i < all.size(); ++i)
    if (all[i]->is_free()) free[n_free++] = i;
  size_t n = n_free ? n_free : all.size();
  auto replica = [&](size_t i) -> const std::shared_ptr<OwnMailbox> & { return all[n_free ? free[i] : i]; };
  size_t first = size_t(round_robin % n), chosen = first;
  if (n > 1) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    size_t second = (first + 1 + size_t((random >> 33) % (n - 1))) % n;
    auto load = [&](const std::shared_ptr<OwnMailbox> &mailbox) {
      size_t sum = 0;
      for (size_t i = 0; i < n_parts; ++i)
        if (parts[i].mailbox == mailbox) sum += parts[i].positions.size();
      return sum;
    };
    if (load(replica(second)) < load(replica(first))) chosen = second;
  }
  *picked = replica(chosen);
  return picked->get();
}

// Sets after how long an answer is late: soon where another replica of each function could give it.
void fk_calls::set_limits(Part *part, const LayerRoutes &routes) const {
  bool has_others = !part->is_repeated;
  part->late_s = part->abandon_s = now.call_timeout_s;
  for (int32_t position : part->positions) {
    int rows = size_class(n_rows_of[size_t(position)]);
    has_others &= routes.routes[size_t(position)].mailboxes.size() > 1;
    part->late_s = std::min(part->late_s, now.hedge_s[rows]);
    part->abandon_s = std::min(part->abandon_s, now.abandon_s[rows]);
  }
  if (!has_others) part->late_s = part->abandon_s;
}

// Whether a mailbox may be called; tells once that its sandbox closed it.
bool fk_calls::is_callable(OwnMailbox *mailbox) {
  if (mailbox->is_usable()) return true;
  if (!mailbox->is_dead && mailbox->check_dead()) add_dead_event(*mailbox);
  return false;
}

// Under the lock.
void fk_calls::add_event(const fk_call_event &event) {
  events.push_back(event);
  n_faults += event.end != FK_CALL_OK;
  if (events.size() > kMaxEvents) take_event();
}

fk_call_event fk_calls::take_event() {
  fk_call_event event = events.front();
  events.pop_front();
  n_faults -= event.end != FK_CALL_OK;
  return event;
}

void fk_calls::add_dead_event(const OwnMailbox &mailbox) {
  std::lock_guard<std::mutex> lock(mutex);
  SlotStatus status = mailbox.was_serving() ? kOk : kSandboxDraining;
  add_event({mailbox.handle, 0.0, int32_t(layer), 0, FK_CALL_DEAD, int32_t(status), {}});
}

// Groups the functions with pairs by who computes them; false if one cannot be reached natively.
bool fk_calls::assign_parts(const LayerRoutes &routes) {
  part_of.assign(routes.routes.size(), -1);
  for (size_t position = 0; position < routes.routes.size(); ++position) {
    if (!n_pairs_of[position]) continue;
    const Route &route = routes.routes[position];
    std::shared_ptr<OwnMailbox> mailbox;
    if (!route.local) {
      if (!pick(route, &mailbox) || !is_callable(mailbox.get())) return false;
    }
    size_t i = 0;
    while (i < n_parts && (parts[i].mailbox != mailbox ||
                           (mailbox && parts[i].positions.size() == size_t(kMaxFunctionsPerFrame))))
      ++i;
    Part &part = i < n_parts ? parts[i] : new_part();
    if (part.positions.empty()) part.mailbox = mailbox;
    part.positions.push_back(int32_t(position));
    part_of[position] = int32_t(i);
  }
  return true;
}

// Finds a slot for each frame; false if one is missing.
bool fk_calls::reserve_slots() {
  for (size_t i = 0; i < n_parts; ++i) {
    Part &part = parts[i];
    if (!part.mailbox) continue;
    int slot = part.mailbox->find_slot();
    bool is_doubtful = slot < 0 || start_ns - part.mailbox->used_ns > kIdleNs;
    if (is_doubtful && part.mailbox->check_dead()) {
      add_dead_event(*part.mailbox);
      return false;
    }
    part.mailbox->used_ns = start_ns;
    if (slot < 0) return false;
    part.slot = uint32_t(slot);
    for (size_t j = 0; j < i; ++j)  // two frames for one sandbox: rare, left to the general path
      if (parts[j].mailbox == part.mailbox) return false;
    if (!part.fits(part.mailbox->memory)) return false;
  }
  return true;
}

void fk_calls::collect_pairs(const LayerRoutes &routes, int64_t rows, int64_t k, const int64_t *index,
                             const float *weight) {
  int64_t n_experts = int64_t(routes.function_of.size()), n_sums = 0;
  rows_end.resize(n_rows_of.size());
  for (size_t position = 0; position < n_rows_of.size(); ++position) {
    rows_end[position] = n_sums;  // where its rows begin, until they are there
    n_sums += n_rows_of[position];
    if (n_rows_of[position]) parts[size_t(part_of[position])].n_sums += n_rows_of[position];
  }
  rows_of.resize(size_t(n_sums));
  last_row.assign(n_rows_of.size(), -1);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = r * k; j < (r + 1) * k; ++j) {
      if (index[j] < 0 || index[j] >= n_experts) continue;
      size_t position = size_t(routes.function_of[size_t(index[j])]);
      if (last_row[position] != int32_t(r)) rows_of[size_t(rows_end[position]++)] = int32_t(r);
      last_row[position] = int32_t(r);
      Part &part = parts[size_t(part_of[position])];
      if (part.rows.empty() || part.rows.back() != int32_t(r)) part.rows.push_back(int32_t(r));
      part.pair_row.push_back(int32_t(part.rows.size()) - 1);
      part.pair_expert.push_back(int32_t(index[j]));
      part.pair_weight.push_back(weight[j]);
    }
  for (size_t i = 0; i < n_parts; ++i) parts[i].header = request(parts[i]);
}

FrameHeader fk_calls::request(const Part &part) const {
  return {kRequest, kFrameDtypes[now.store_dtype], kReduced, uint16_t(layer),
          uint32_t(part.rows.size()), uint32_t(part.pair_row.size()), uint32_t(hidden_size)};
}

// Writes a part's rows in the store's dtype: its frame into the mailbox, or its input.
void fk_calls::encode(Part *part, const LayerRoutes &routes) {
  int64_t row_bytes = part->header.row_bytes(), source_bytes = hidden_size * item_bytes(hidden_dtype);
  uint8_t *rows;
  if (part->mailbox) {
    uint8_t *frame = part->mailbox->memory.request(part->slot);
    write_fields(frame, part->header);
    size_t size = 4 * part->pair_row.size();
    std::memcpy(frame + kFrameHeaderBytes, part->pair_row.data(), size);
    std::memcpy(frame + kFrameHeaderBytes + size, part->pair_expert.data(), size);
    std::memcpy(frame + kFrameHeaderBytes + 2 * size, part->pair_weight.data(), size);
    rows = frame + kFrameHeaderBytes + 3 * size;
  } else {
    part->input.resize(size_t(row_bytes) * part->rows.size());
    part->output.resize(size_t(part->n_sums * hidden_size));
    rows = part->input.data();
  }
  for (int32_t row : part->rows) {
    copy_row(hidden + row * source_bytes, hidden_dtype, rows, now.store_dtype, hidden_size);
    rows += row_bytes;
  }
  if (!part->mailbox) return;
  write_checksum(part->mailbox->memory.request(part->slot), part->header);
  Slot &slot = part->mailbox->memory.slot(part->slot);
  slot.n_functions = uint32_t(part->positions.size());
  for (size_t i = 0; i < part->positions.size(); ++i)
    std::memcpy(slot.ids[i], routes.routes[size_t(part->positions[i])].id, kFunctionIdBytes);
}

void fk_calls::send(Part *part) {
  OwnMailbox &mailbox = *part->mailbox;
  Slot &slot = mailbox.memory.slot(part->slot);
  part->sequence = ++mailbox.sequence;
  part->sent_ns = monotonic_ns();
  slot.sequence = part->sequence;
  slot.request_bytes = uint32_t(part->header.frame_bytes());
  slot.table_version = uint64_t(pending_table->version);
  slot.deadline_ns = uint64_t(part->sent_ns + int64_t(now.call_timeout_s * 1e9));
  slot.router_waits.store(0, std::memory_order_relaxed);
  slot.state.store(kRequestReady);
  MailboxHeader &header = mailbox.memory.header();
  header.doorbell.fetch_add(1);
  if (header.sandbox_waits.load()) futex_wake(&header.doorbell);
  part->is_sent = true;
}

void fk_calls::start_load(const LayerRoutes &routes) {
  double now_s = double(start_ns) / 1e9;
  std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < n_pairs_of.size(); ++i) {
    if (!n_pairs_of[i]) continue;
    fk_function_totals &function = functions[size_t(routes.routes[i].function)];
    function.offset_s -= now_s;
    ++function.n_in_flight;
  }
}

// Ends the layer: its calls are no longer in flight, its local functions no longer in use.
void fk_calls::end_load(bool is_done) {
  const LayerRoutes &routes = pending_table->layers[size_t(layer)];
  int64_t now_ns = monotonic_ns();
  std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < n_pairs_of.size(); ++i) {
    if (!n_pairs_of[i]) continue;
    fk_function_totals &function = functions[size_t(routes.routes[i].function)];
    function.offset_s += double(now_ns) / 1e9;
    --function.n_in_flight;
    if (routes.routes[i].local) --routes.routes[i].local->n_running;
    if (!is_done) continue;
    ++function.calls;
    function.rows += n_rows_of[i];
    size_t counted = size_t(routes.first_pairs) + i;
    if (counted < pairs.size()) pairs[counted] += n_pairs_of[i];
    if (routes.routes[i].local) ++totals.local_calls;
  }
  is_pending = false;
  is_in_layer = false;
  pending_table.reset();
  if (!is_done) {
    ++totals.general_layers;
    return;
  }
  double seconds = double(now_ns - start_ns) / 1e9;
  ++totals.layers;
  totals.layers_s += seconds;
  layer_seconds.push_back(seconds);
  if (layer_seconds.size() > kMaxEvents) layer_seconds.pop_front();
}

int32_t fk_calls::general() {
  for (size_t i = 0; i < n_parts; ++i) abandon(&parts[i]);
  if (is_pending) {
    end_load(false);
  } else {
    is_in_layer = false;
    std::lock_guard<std::mutex> lock(mutex);
    ++totals.general_layers;
  }
  return FK_CALLS_GENERAL;
}

void fk_calls::enter_layer() {
  is_in_layer = true;
  while (is_releasing) std::this_thread::yield();
}

void fk_calls::release_memory() {
  is_releasing = true;
  if (!is_in_layer) {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto &entry : mailboxes) entry.second->memory.release_pages();
  }
  is_releasing = false;
}

int32_t fk_calls::begin(int64_t l, int64_t rows, int64_t h, int64_t k, const uint8_t *from, int32_t dtype,
                        const int64_t *index, const float *weight) {
  if (is_pending) general();  // an earlier layer that nobody finished
  n_parts = 0;
  enter_layer();
  if (l < 0 || rows < 0 || h < 1 || k < 1 || dtype < FK_FLOAT32 || dtype > FK_FLOAT16 || !from || !index || !weight)
    return is_in_layer = false, set_calls_error("begin: a size, dtype or address is out of range");
  std::shared_ptr<const Table> current;
  {
    std::lock_guard<std::mutex> lock(mutex);
    current = table;
    now = settings;
  }
  if (l >= int64_t(current->layers.size()) || rows < 1 || rows > now.max_rows || h > (1 << 20)) return general();
  layer = l;
  n_rows = rows;
  hidden_size = h;
  hidden = from;
  hidden_dtype = dtype;
  start_ns = monotonic_ns();
  ++round_robin;
  const LayerRoutes &routes = current->layers[size_t(l)];
  if (!count_pairs(routes, rows, k, index, weight) || !assign_parts(routes)) return general();
  collect_pairs(routes, rows, k, index, weight);
  if (!reserve_slots()) return general();
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < n_pairs_of.size(); ++i) {  // under the lock: remove_local waits for users
      FunctionWeights *local = n_pairs_of[i] ? routes.routes[i].local.get() : nullptr;
      if (!local) continue;
      if (local->is_retracted) {
        for (size_t j = 0; j < i; ++j)
          if (n_pairs_of[j] && routes.routes[j].local) --routes.routes[j].local->n_running;
        ++totals.general_layers;
        is_in_layer = false;
        return FK_CALLS_GENERAL;
      }
      ++local->n_running;
    }
  }
  pending_table = current;
  is_pending = true;
  start_load(routes);
  for (size_t i = 0; i < n_parts; ++i) {
    encode(&parts[i], routes);
    set_limits(&parts[i], routes);
    if (parts[i].mailbox) send(&parts[i]);
  }
  return FK_CALLS_DONE;
}

bool fk_calls::compute_local(Part *part) {
  const LayerRoutes &routes = pending_table->layers[size_t(layer)];
  std::vector<const LayerWeights *> weights;
  for (int32_t position : part->positions) {
    const LayerWeights *found = routes.routes[size_t(position)].local->find(layer);
    if (!found || found->hidden_size != hidden_size || found->dtype != now.store_dtype) return false;
    weights.push_back(found);
  }
  bool is_busy = n_parts > 1;  // functions of this machine compute beside this one
  CallPairs pairs{int64_t(part->rows.size()), int64_t(part->pair_row.size()), part->pair_row.data(),
                  part->pair_expert.data(), part->pair_weight.data()};
  int n_weights = int(weights.size());
  if (place_sums(weights.data(), n_weights, pairs, &scratch) != part->n_sums) return false;
  ComputeResult result = compute_sums(weights.data(), n_weights, pairs, part->n_sums, part->input.data(),
                                      part->output.data(), is_busy ? 1 : std::max(1, now.n_threads), &scratch);
  if (result != kComputed) return false;
  return std::none_of(weights.begin(), weights.end(), [](const LayerWeights *w) { return w->is_changed(); });
}

// Computes the functions of this process, unless they were.
bool fk_calls::compute_locals() {
  for (size_t i = 0; i < n_parts; ++i) {
    Part &part = parts[i];
    if (part.mailbox || part.is_computed) continue;
    if (!compute_local(&part)) return false;
    part.is_computed = true;
  }
  return true;
}

// Waits for an answer.
fk_call_end fk_calls::wait(Part *part) {
  OwnMailbox &mailbox = *part->mailbox;
  Slot &slot = mailbox.memory.slot(part->slot);
  int64_t late_ns = part->sent_ns + int64_t(std::min(part->late_s, 3600.0) * 1e9);
  for (;;) {
    uint32_t state = slot.state.load();
    if (state == kDone) return FK_CALL_OK;
    if (state != kRequestReady && state != kBusy) return FK_CALL_BROKEN;
    int64_t remaining_ns = late_ns - monotonic_ns();
    if (remaining_ns <= 0) return mailbox.check_dead() ? FK_CALL_DEAD : FK_CALL_LATE;
    slot.router_waits.store(1);
    int64_t before_ns = monotonic_ns();
    futex_wait(&slot.state, state, std::min(kSliceNs, remaining_ns));
    slot.router_waits.store(0);
    int64_t now_ns = monotonic_ns();
    if (now_ns - before_ns < kSliceNs || slot.state.load() == kDone) continue;
    if (mailbox.check_dead()) return FK_CALL_DEAD;
    Life life = mailbox.life();
    if (life != kRuns) return life == kStopped ? FK_CALL_STOPPED : FK_CALL_DEAD;
  }
}

// Checks an answer that is there.
fk_call_end fk_calls::verify(const Part &part, uint32_t *status, char *detail) {
  Slot &slot = part.mailbox->memory.slot(part.slot);
  uint32_t size = *const_cast<volatile uint32_t *>(&slot.response_bytes);
  *status = *const_cast<volatile uint32_t *>(&slot.status);
  std::memcpy(detail, slot.detail, sizeof slot.detail);
  detail[sizeof slot.detail - 1] = 0;
  auto broken = [&](const char *field) {
    std::snprintf(detail, sizeof slot.detail, "%s", field);
    return FK_CALL_BROKEN;
  };
  if (slot.answered_sequence != part.sequence) return broken("sequence");
  if (*status > kFailed) return broken("status");
  if (*status != kOk) return FK_CALL_DECLINED;
  if (size > part.mailbox->memory.response_bytes) return broken("response_bytes");
  const char *field = check_response(part.mailbox->memory.response(part.slot), size, part.answer());
  return field ? broken(field) : FK_CALL_OK;
}

void fk_calls::record(const Part &part, fk_call_end end, uint32_t status, const char *detail) {
  fk_call_event event{part.mailbox->handle, double(monotonic_ns() - part.sent_ns) / 1e9, int32_t(layer),
                      int32_t(part.rows.size()), end, int32_t(status), {}};
  std::snprintf(event.detail, sizeof event.detail, "%s", detail);
  std::lock_guard<std::mutex> lock(mutex);
  ++totals.calls;
  totals.sent_bytes += part.header.frame_bytes();
  if (end == FK_CALL_OK) totals.received_bytes += part.answer().frame_bytes();
  add_event(event);
}

// Gives up a call whose answer nobody waits for any more.
void fk_calls::abandon(Part *part) {
  if (!part->mailbox || !part->is_sent) return;
  part->is_sent = false;
  Slot &slot = part->mailbox->memory.slot(part->slot);
  uint32_t state = kRequestReady;
  if (slot.state.compare_exchange_strong(state, kFree)) return;
  state = kBusy;
  if (slot.state.compare_exchange_strong(state, kAbandoned)) return;
  state = kDone;
  slot.state.compare_exchange_strong(state, kFree);
}

// Appends parts for a lost one's functions, each for another replica; false if one has none that is free.
bool fk_calls::divide(size_t lost, size_t first) {
  const LayerRoutes &routes = pending_table->layers[size_t(layer)];
  const std::shared_ptr<OwnMailbox> lost_mailbox = parts[lost].mailbox;
  for (size_t n = 0; n < parts[lost].positions.size(); ++n) {
    int32_t position = parts[lost].positions[n];
    std::shared_ptr<OwnMailbox> other;
    for (const auto &mailbox : routes.routes[size_t(position)].mailboxes)
      if (!other && mailbox != lost_mailbox && mailbox->is_free()) other = mailbox;
    if (!other) return false;
    size_t i = first;
    while (i < n_parts && parts[i].mailbox != other) ++i;
    Part &part = i < n_parts ? parts[i] : new_part();
    part.mailbox = other;
    part.is_repeated = true;
    part.slot = uint32_t(other->find_slot());
    part.positions.push_back(position);
    part.n_sums += n_rows_of[size_t(position)];
    part_of[size_t(position)] = int32_t(i);
  }
  for (size_t p = 0; p < parts[lost].pair_row.size(); ++p) {
    const Part &from = parts[lost];
    Part &part = parts[size_t(part_of[size_t(routes.function_of[size_t(from.pair_expert[p])])])];
    int32_t row = from.rows[size_t(from.pair_row[p])];
    if (part.rows.empty() || part.rows.back() != row) part.rows.push_back(row);
    part.pair_row.push_back(int32_t(part.rows.size()) - 1);
    part.pair_expert.push_back(from.pair_expert[p]);
    part.pair_weight.push_back(from.pair_weight[p]);
  }
  return true;
}

// Sends to other replicas what one sandbox has not answered; false if one of its functions has none.
bool fk_calls::send_elsewhere(size_t lost) {
  const LayerRoutes &routes = pending_table->layers[size_t(layer)];
  size_t first = n_parts;
  if (parts[lost].is_repeated) return false;
  bool is_sendable = divide(lost, first);
  for (size_t i = first; i < n_parts; ++i) {
    parts[i].header = request(parts[i]);
    is_sendable &= parts[i].fits(parts[i].mailbox->memory);
  }
  if (!is_sendable) {  // it may still answer
    n_parts = first;
    for (int32_t position : parts[lost].positions) part_of[size_t(position)] = int32_t(lost);
    return false;
  }
  for (size_t i = first; i < n_parts; ++i) {
    encode(&parts[i], routes);
    set_limits(&parts[i], routes);
    send(&parts[i]);
  }
  return true;
}

// Waits for a part's answer and verifies it; what is not FK_CALL_OK has to be computed elsewhere, unless
// other replicas compute it already.
fk_call_end fk_calls::collect(size_t i, bool *is_elsewhere) {
  char detail[sizeof Slot::detail] = "";
  uint32_t status = kOk;
  fk_call_end end;
  for (;;) {
    end = wait(&parts[i]);
    if (end == FK_CALL_OK || end == FK_CALL_BROKEN) break;
    *is_elsewhere = send_elsewhere(i);
    if (*is_elsewhere || end != FK_CALL_LATE || parts[i].late_s >= parts[i].abandon_s) break;
    parts[i].late_s = parts[i].abandon_s;  // all are busy, and this one is as near to an answer as any
  }
  const Part &part = parts[i];
  if (end == FK_CALL_OK) end = verify(part, &status, detail);
  if (end == FK_CALL_BROKEN || end == FK_CALL_DEAD) part.mailbox->is_dead = true;
  if (end == FK_CALL_LATE || end == FK_CALL_STOPPED) part.mailbox->is_silent = true;
  if (end == FK_CALL_DEAD && !part.mailbox->was_serving()) status = kSandboxDraining;
  record(part, end, status, detail);
  return end;
}

int32_t fk_calls::finish(int64_t l, uint8_t *out, int32_t dtype) {
  if (!is_pending) return set_calls_error("finish: no layer has begun");
  if (l != layer) return set_calls_error("finish: got layer %lld, expected %lld", (long long)l, (long long)layer);
  if (!out || dtype < FK_FLOAT32 || dtype > FK_FLOAT16) return set_calls_error("finish: out or dtype is out of range");
  if (!compute_locals()) return general();
  bool is_sandbox_lost = false;  // then the others' answers free their slots for another try
  for (size_t i = 0; i < n_parts; ++i) {  // more of them while some are sent elsewhere
    bool is_elsewhere = false;
    fk_call_end end = parts[i].mailbox ? collect(i, &is_elsewhere) : FK_CALL_OK;
    if (end == FK_CALL_OK) continue;
    abandon(&parts[i]);
    if (is_elsewhere) continue;
    if (end != FK_CALL_DEAD && end != FK_CALL_STOPPED) return general();
    is_sandbox_lost = true;
  }
  if (is_sandbox_lost) return general();
  int64_t size = n_rows * hidden_size;
  float *sum = reinterpret_cast<float *>(out);
  if (dtype == FK_FLOAT32) {
    std::memset(out, 0, size_t(4 * size));
  } else {
    total.assign(size_t(size), 0.0f);
    sum = total.data();
  }
  for (size_t position = 0; position < n_rows_of.size(); ++position) {  // wherever each was computed
    int64_t count = n_rows_of[position];
    if (!count) continue;
    Part &part = parts[size_t(part_of[position])];
    const float *from = part.sums() + part.n_added * hidden_size;
    const int32_t *rows = rows_of.data() + rows_end[position] - count;
    for (int64_t i = 0; i < count; ++i) add_row(sum + rows[i] * hidden_size, from + i * hidden_size, hidden_size);
    part.n_added += count;
  }
  if (!is_finite(sum, size)) return general();
  if (dtype != FK_FLOAT32)
    copy_row(reinterpret_cast<const uint8_t *>(sum), FK_FLOAT32, out, dtype, size);
  for (size_t i = 0; i < n_parts; ++i) {
    if (!parts[i].is_sent) continue;
    parts[i].mailbox->memory.slot(parts[i].slot).state.store(kFree);
    parts[i].is_sent = false;
  }
  end_load(true);
  return FK_CALLS_DONE;
}

#define FK_EXPORT __attribute__((visibility("default")))

extern "C" {

FK_EXPORT fk_calls *fk_calls_new(void) { return new fk_calls; }

FK_EXPORT void fk_calls_free(fk_calls *calls) {
  if (calls->is_pending) calls->general();
  delete calls;
}

FK_EXPORT int64_t fk_mailbox_size(int32_t n_slots, int32_t request_bytes, int32_t response_bytes) {
  return Mailbox::size_bytes(uint32_t(n_slots), uint32_t(request_bytes), uint32_t(response_bytes));
}

FK_EXPORT int64_t fk_calls_add_mailbox(fk_calls *calls, int32_t fd, int64_t size_bytes, int32_t n_slots,
                                       int32_t request_bytes, int32_t response_bytes, int32_t socket_fd) {
  auto mailbox = std::make_shared<OwnMailbox>();
  mailbox->socket = fcntl(socket_fd, F_DUPFD_CLOEXEC, 0);
  if (mailbox->socket < 0) return set_calls_error("mailbox: the socket cannot be duplicated");
  mailbox->pid = peer_pid(socket_fd);
  const char *error = mailbox->memory.create(fd, size_bytes, uint32_t(n_slots), uint32_t(request_bytes),
                                             uint32_t(response_bytes));
  if (error) return set_calls_error("mailbox: %s", error);
  std::lock_guard<std::mutex> lock(calls->mutex);
  mailbox->handle = calls->next_handle++;
  calls->mailboxes[mailbox->handle] = mailbox;
  return mailbox->handle;
}

FK_EXPORT int32_t fk_calls_remove_mailbox(fk_calls *calls, int64_t mailbox) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  auto found = calls->mailboxes.find(mailbox);
  if (found == calls->mailboxes.end()) return set_calls_error("mailbox: got an unknown handle");
  found->second->is_dead = true;  // routes that still name it are no longer used
  shutdown(found->second->socket, SHUT_RDWR);  // tables may hold it for long
  calls->mailboxes.erase(found);
  return 0;
}

FK_EXPORT int64_t fk_calls_add_local(fk_calls *calls, const fk_function_layer *layers, int64_t n_layers) {
  const char *error = nullptr;
  auto function = copy_function("", layers, n_layers, &error);
  if (!function) return set_calls_error("%s", error);
  std::lock_guard<std::mutex> lock(calls->mutex);
  calls->locals[calls->next_handle] = std::move(function);
  return calls->next_handle++;
}

FK_EXPORT int32_t fk_calls_remove_local(fk_calls *calls, int64_t local) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  auto found = calls->locals.find(local);
  if (found == calls->locals.end()) return set_calls_error("local: got an unknown handle");
  found->second->is_retracted = true;
  if (found->second->n_running) return 1;
  calls->locals.erase(found);
  return 0;
}

FK_EXPORT int32_t fk_calls_publish(fk_calls *calls, int64_t version, const fk_layer_routes *layers,
                                   int64_t n_layers) {
  auto table = std::make_shared<Table>();
  table->version = version;
  std::lock_guard<std::mutex> lock(calls->mutex);
  int64_t n_functions = int64_t(calls->functions.size());
  for (int64_t l = 0; l < n_layers; ++l) {
    LayerRoutes routes;
    routes.first_pairs = table->n_routes;
    routes.function_of.assign(layers[l].function_of, layers[l].function_of + layers[l].n_experts);
    for (int32_t position : routes.function_of)
      if (position < 0 || position >= layers[l].n_routes) return set_calls_error("function_of: got %d", position);
    for (int64_t i = 0; i < layers[l].n_routes; ++i) {
      const fk_route &from = layers[l].routes[i];
      Route route;
      route.function = from.function;
      std::memcpy(route.id, from.id, sizeof route.id);
      if (from.function < 0 || from.function > (1 << 20)) return set_calls_error("function: got a wrong index");
      n_functions = std::max(n_functions, from.function + 1);
      if (from.local) {
        auto found = calls->locals.find(from.local);
        if (found != calls->locals.end()) route.local = found->second;  // else removed meanwhile
      }
      if (from.n_mailboxes < 0 || from.n_mailboxes > FK_MAX_REPLICAS)
        return set_calls_error("n_mailboxes: got %lld", (long long)from.n_mailboxes);
      for (int64_t m = 0; m < from.n_mailboxes; ++m) {
        auto found = calls->mailboxes.find(from.mailboxes[m]);
        if (found == calls->mailboxes.end()) {  // removed meanwhile: the next table is without it
          route.mailboxes.clear();
          break;
        }
        route.mailboxes.push_back(found->second);
      }
      routes.routes.push_back(std::move(route));
    }
    table->n_routes += layers[l].n_routes;
    table->layers.push_back(std::move(routes));
  }
  calls->functions.resize(size_t(n_functions));
  if (int64_t(calls->pairs.size()) != table->n_routes) calls->pairs.assign(size_t(table->n_routes), 0);
  calls->table = std::move(table);
  return 0;
}

FK_EXPORT void fk_calls_configure(fk_calls *calls, const fk_calls_settings *settings) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  calls->settings = *settings;
}

FK_EXPORT int32_t fk_calls_begin_dtype(fk_calls *calls, int64_t layer, int64_t rows, int64_t hidden_size,
                                       int64_t top_k, const void *hidden, int32_t dtype,
                                       const int64_t *top_k_index, const float *top_k_weight) {
  try {
    return calls->begin(layer, rows, hidden_size, top_k, static_cast<const uint8_t *>(hidden), dtype, top_k_index,
                        top_k_weight);
  } catch (const std::bad_alloc &) {
    return calls->general();
  }
}

FK_EXPORT int32_t fk_calls_finish_dtype(fk_calls *calls, int64_t layer, void *out, int32_t dtype) {
  try {
    return calls->finish(layer, static_cast<uint8_t *>(out), dtype);
  } catch (const std::bad_alloc &) {
    return calls->general();
  }
}

FK_EXPORT int32_t fk_calls_begin(void *calls, int64_t layer, int64_t rows, int64_t hidden_size, int64_t top_k,
                                 const float *hidden, const int64_t *top_k_index, const float *top_k_weight) {
  auto *self = static_cast<fk_calls *>(calls);
  int32_t status = fk_calls_begin_dtype(self, layer, rows, hidden_size, top_k, hidden, FK_FLOAT32, top_k_index,
                                        top_k_weight);
  if (status) return status;
  try {
    if (!self->compute_locals()) return self->general();
    return fk_calls_n_in_flight(self) ? FK_CALLS_DONE : FK_CALLS_LOCAL;
  } catch (const std::bad_alloc &) {
    return self->general();
  }
}

FK_EXPORT int32_t fk_calls_finish(void *calls, int64_t layer, float *out) {
  return fk_calls_finish_dtype(static_cast<fk_calls *>(calls), layer, out, FK_FLOAT32);
}

FK_EXPORT void fk_calls_release_memory(fk_calls *calls) { calls->release_memory(); }

FK_EXPORT int32_t fk_calls_n_in_flight(fk_calls *calls) {
  int32_t n = 0;
  for (size_t i = 0; calls->is_pending && i < calls->n_parts; ++i) n += calls->parts[i].is_sent;
  return n;
}

FK_EXPORT void fk_calls_read_left(fk_calls *calls, fk_calls_left *out) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  *out = {calls->totals.layers, calls->totals.layers_s, int64_t(calls->events.size()), calls->n_faults};
}

FK_EXPORT int64_t fk_calls_take_events(fk_calls *calls, fk_call_event *out, int64_t max) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  int64_t n = std::min<int64_t>(max, int64_t(calls->events.size()));
  for (int64_t i = 0; i < n; ++i) out[i] = calls->take_event();
  if (calls->events.empty())  // whoever took them decides what is called
    for (auto &entry : calls->mailboxes) entry.second->is_silent = false;
  return n;
}

FK_EXPORT int64_t fk_calls_take_layer_seconds(fk_calls *calls, double *out, int64_t max) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  int64_t n = std::min<int64_t>(max, int64_t(calls->layer_seconds.size()));
  std::copy_n(calls->layer_seconds.begin(), n, out);
  calls->layer_seconds.erase(calls->layer_seconds.begin(), calls->layer_seconds.begin() + n);
  return n;
}

FK_EXPORT void fk_calls_take_pairs(fk_calls *calls, int64_t *out, int64_t n) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = i < int64_t(calls->pairs.size()) ? calls->pairs[size_t(i)] : 0;
    if (i < int64_t(calls->pairs.size())) calls->pairs[size_t(i)] = 0;
  }
}

FK_EXPORT void fk_calls_read_totals(fk_calls *calls, fk_calls_totals *out, fk_function_totals *functions,
                                    int64_t n_functions) {
  std::lock_guard<std::mutex> lock(calls->mutex);
  *out = calls->totals;
  for (int64_t i = 0; i < n_functions; ++i)
    functions[i] = i < int64_t(calls->functions.size()) ? calls->functions[size_t(i)] : fk_function_totals{};
}

}  // extern "C"
