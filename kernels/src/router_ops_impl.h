// Attention over a paged cache, norms and gating for one instruction set. Included by src/isa_*.cpp
// after kernels_impl.h, whose vector types it uses.
//
// Attention goes over keys in tiles, with a running softmax (Milakov and Gimelshein). A tile's keys
// are transposed once and serve all query heads of their group and several query rows.

#include <vector>

#include "router_ops.h"

namespace FK_NAMESPACE {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kTileQueries = 48;  // query rows times heads of a group, about
constexpr int64_t kSerialWork = 1 << 17;  // multiplications below which one thread is faster
constexpr int64_t kAheadKeys = 4;         // whose cached rows are prefetched: a head's are far apart

// Rows and vectors that are accumulated in registers at once.
constexpr int kRegisterRows = L == 16 ? 4 : 2;
constexpr int kRegisterVectors = 4;
static_assert(kTileKeys % (kRegisterVectors * L) == 0, "tiles are whole registers");

struct AttentionScratch {
  std::vector<float> queries, keys, values, scores, sums, maxima, totals;
  void resize(int64_t rows, int64_t head_dim, int64_t padded) {
    queries.resize(rows * head_dim);
    keys.resize(head_dim * kTileKeys);
    values.resize(kTileKeys * padded);
    scores.resize(rows * kTileKeys);
    sums.resize(rows * padded);
    maxima.resize(rows);
    totals.resize(rows);
  }
};

// Query rows [begin, end) of one request with one head of keys.
struct AttentionItem {
  int64_t request, begin, end, head;
};

struct AttentionCall {
  const fk_attention &a;
  const fk_attention_batch &batch;
  const float *queries;
  int64_t query_stride;
  const float *keys;
  int64_t key_stride;
  const float *values;
  int64_t value_stride;
  float *out;
};

static inline void read_slot(const void *cache, int32_t dtype, int64_t offset, int64_t count, float *to) {
  if (dtype == FK_FLOAT32) {
    std::memcpy(to, (const float *)cache + offset, count * sizeof(float));
  } else if (dtype == FK_BFLOAT16) {
    const uint16_t *from = (const uint16_t *)cache + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(from[i]);
  } else {
    const uint16_t *from = (const uint16_t *)cache + offset;
    for (int64_t i = 0; i < count; ++i) to[i] = from_f16(from[i]);
  }
}

static inline void prefetch_row(const void *cache, int32_t dtype, int64_t offset, int64_t count) {
  const uint8_t *from = (const uint8_t *)cache + offset * dtype_bytes(dtype);
  for (int64_t i = 0; i < count * dtype_bytes(dtype); i += kCacheLineBytes) __builtin_prefetch(from + i, 0, 2);
}

// Keys [first, first + count) of a request: transposed [head_dim, kTileKeys], and values [count, padded].
static void load_tile(const AttentionCall &c, const AttentionItem &item, int64_t first, int64_t count,
                      int64_t n_cached, int64_t padded, AttentionScratch &s) {
  int64_t d = c.a.head_dim, slot_width = c.a.n_kv_heads * d;
  int64_t query_offset = c.batch.query_offsets[item.request];
  const int64_t *slots = c.batch.read_index ? c.batch.read_index + c.batch.key_offsets[item.request] : nullptr;
  float *row_buffer = s.scores.data();  // not in use yet; at least kTileKeys, see attend_item
  for (int64_t j = 0; j < count; ++j) {
    int64_t key = first + j;
    const float *key_row;
    float *value_row = s.values.data() + j * padded;
    if (key + kAheadKeys < n_cached) {
      int64_t ahead = slots[key + kAheadKeys] * slot_width + item.head * d;
      prefetch_row(c.a.k_cache, c.a.cache_dtype, ahead, d);
      prefetch_row(c.a.v_cache, c.a.cache_dtype, ahead, d);
    }
    if (key < n_cached) {
      int64_t offset = slots[key] * slot_width + item.head * d;
      if (c.a.cache_dtype == FK_FLOAT32) {
        key_row = (const float *)c.a.k_cache + offset;
      } else {
        read_slot(c.a.k_cache, c.a.cache_dtype, offset, d, row_buffer);
        key_row = row_buffer;
      }
      read_slot(c.a.v_cache, c.a.cache_dtype, offset, d, value_row);
    } else {
      int64_t row = query_offset + key - n_cached;
      key_row = c.keys + row * c.key_stride + item.head * d;
      std::memcpy(value_row, c.values + row * c.value_stride + item.head * d, d * sizeof(float));
    }
    for (int64_t i = d; i < padded; ++i) value_row[i] = 0;
    for (int64_t i = 0; i < d; ++i) s.keys[i * kTileKeys + j] = key_row[i];
  }
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = count; j < kTileKeys; ++j) s.keys[i * kTileKeys + j] = 0;
}

// scores[R, kRegisterVectors * L] of R queries.
template <int R>
static inline void score_rows(const float *queries, int64_t d, const float *keys, float *scores) {
  vf acc[R][kRegisterVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kRegisterVectors; ++v) acc[r][v] = vf{};
  for (int64_t i = 0; i < d; ++i) {
    vf key[kRegisterVectors];
    for (int v = 0; v < kRegisterVectors; ++v) key[v] = load<vf>(keys + i * kTileKeys + v * L);
    for (int r = 0; r < R; ++r) {
      vf query = splat(queries[r * d + i]);
      for (int v = 0; v < kRegisterVectors; ++v) acc[r][v] += query * key[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kRegisterVectors; ++v) store(scores + r * kTileKeys + v * L, acc[r][v]);
}

// sums[R, V * L] = sums * corrections + probabilities @ values.
template <int R, int V>
static inline void add_values(const float *probabilities, int64_t count, const float *values,
                              int64_t padded, const float *corrections, float *sums) {
  vf acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = load<vf>(sums + r * padded + v * L) * splat(corrections[r]);
  for (int64_t j = 0; j < count; ++j) {
    vf value[V];
    for (int v = 0; v < V; ++v) value[v] = load<vf>(values + j * padded + v * L);
    for (int r = 0; r < R; ++r) {
      vf p = splat(probabilities[r * kTileKeys + j]);
      for (int v = 0; v < V; ++v) acc[r][v] += p * value[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(sums + r * padded + v * L, acc[r][v]);
}

template <int R>
static inline void add_value_rows(const float *probabilities, int64_t count, const float *values,
                                  int64_t padded, const float *corrections, float *sums) {
  int64_t i = 0;
  for (; i + kRegisterVectors * L <= padded; i += kRegisterVectors * L)
    add_values<R, kRegisterVectors>(probabilities, count, values + i, padded, corrections, sums + i);
  for (; i < padded; i += L) add_values<R, 1>(probabilities, count, values + i, padded, corrections, sums + i);
}

static inline float exp_of(float x) {
  vf lanes = vector_exp(splat(x));
  return lanes[0];
}

// Turns scores [begin, end) of a row into probabilities relative to the running maximum; others into
// 0. Returns the factor of what was summed before.
static inline float update_softmax(float *scores, int64_t begin, int64_t end, float softcap, float &maximum,
                                   float &total) {
  if (begin >= end) {
    std::fill(scores, scores + kTileKeys, 0.0f);
    return 1.0f;
  }
  if (softcap > 0)
    for (int64_t j = begin; j < end; ++j) scores[j] = softcap * std::tanh(scores[j] / softcap);
  for (int64_t j = 0; j < begin; ++j) scores[j] = -INFINITY;
  for (int64_t j = end; j < kTileKeys; ++j) scores[j] = -INFINITY;
  vf highest = load<vf>(scores);
  for (int64_t j = L; j < kTileKeys; j += L) {
    vf x = load<vf>(scores + j);
    highest = x > highest ? x : highest;
  }
  float tile_maximum = highest[0];
  for (int i = 1; i < L; ++i) tile_maximum = std::max(tile_maximum, float(highest[i]));
  float new_maximum = std::max(maximum, tile_maximum);
  vf sum{};
  for (int64_t j = 0; j < kTileKeys; j += L) {
    vf x = load<vf>(scores + j);
    vf p = vector_exp(x - splat(new_maximum));
    p = x == splat(-INFINITY) ? vf{} : p;
    store(scores + j, p);
    sum += p;
  }
  float correction = maximum == -INFINITY ? 0.0f : exp_of(maximum - new_maximum);
  total = total * correction + horizontal_sum(sum);
  maximum = new_maximum;
  return correction;
}

static void attend_item(const AttentionCall &c, const AttentionItem &item, AttentionScratch &s) {
  int64_t d = c.a.head_dim, padded = (d + L - 1) / L * L, group = c.a.n_heads / c.a.n_kv_heads;
  int64_t rows = (item.end - item.begin) * group;
  int64_t query_offset = c.batch.query_offsets[item.request];
  int64_t n_queries = c.batch.query_offsets[item.request + 1] - query_offset;
  int64_t n_keys = c.batch.key_offsets[item.request + 1] - c.batch.key_offsets[item.request];
  int64_t n_cached = n_keys - n_queries;
  s.resize(std::max<int64_t>(rows, (d + kTileKeys - 1) / kTileKeys), d, padded);
  for (int64_t r = 0; r < rows; ++r) {
    int64_t head = item.head * group + r % group;
    const float *from = c.queries + (query_offset + item.begin + r / group) * c.query_stride + head * d;
    for (int64_t i = 0; i < d; ++i) s.queries[r * d + i] = from[i] * c.a.scaling;
    s.maxima[r] = c.a.sinks ? c.a.sinks[head] : -INFINITY;
    s.totals[r] = c.a.sinks ? 1.0f : 0.0f;
  }
  std::fill(s.sums.begin(), s.sums.begin() + rows * padded, 0.0f);
  float corrections[kRegisterRows];
  int64_t last = n_cached + item.end;  // keys of the last row
  int64_t first = c.a.window ? std::max<int64_t>(0, n_cached + item.begin - c.a.window + 1) : 0;
  for (; first < last; first += kTileKeys) {
    int64_t count = std::min(kTileKeys, last - first);
    load_tile(c, item, first, count, n_cached, padded, s);
    for (int64_t r = 0; r < rows;) {
      int n = rows - r >= kRegisterRows ? kRegisterRows : 1;
      float *scores = s.scores.data() + r * kTileKeys;
      for (int64_t j = 0; j < kTileKeys; j += kRegisterVectors * L) {
        if (n == 1)
          score_rows<1>(s.queries.data() + r * d, d, s.keys.data() + j, scores + j);
        else
          score_rows<kRegisterRows>(s.queries.data() + r * d, d, s.keys.data() + j, scores + j);
      }
      for (int i = 0; i < n; ++i) {
        int64_t position = n_cached + item.begin + (r + i) / group;
        int64_t begin = c.a.window ? std::max<int64_t>(0, position - c.a.window + 1 - first) : 0;
        int64_t end = std::min(count, position + 1 - first);
        corrections[i] = update_softmax(scores + i * kTileKeys, begin, end, c.a.softcap, s.maxima[r + i], s.totals[r + i]);
      }
      if (n == 1)
        add_value_rows<1>(scores, count, s.values.data(), padded, corrections, s.sums.data() + r * padded);
      else
        add_value_rows<kRegisterRows>(scores, count, s.values.data(), padded, corrections, s.sums.data() + r * padded);
      r += n;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    int64_t row = query_offset + item.begin + r / group, head = item.head * group + r % group;
    float *to = c.out + (row * c.a.n_heads + head) * d, factor = 1.0f / s.totals[r];
    for (int64_t i = 0; i < d; ++i) to[i] = s.sums[r * padded + i] * factor;
  }
}

static inline void write_row(const float *from, int64_t count, void *cache, int32_t dtype, int64_t offset) {
  if (dtype == FK_FLOAT32) {
    std::memcpy((float *)cache + offset, from, count * sizeof(float));
    return;
  }
  uint16_t *to = (uint16_t *)cache + offset;
  for (int64_t i = 0; i < count; ++i) to[i] = dtype == FK_BFLOAT16 ? to_bf16(from[i]) : to_f16(from[i]);
}

static void write_slots(void *cache, int32_t dtype, const int64_t *slots, int64_t rows, int64_t width,
                        const float *from, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    write_row(from + r * stride, width, cache, dtype, slots[r] * width);
}

static void attend(const fk_attention &a, const fk_attention_batch &batch, const float *queries,
                   int64_t query_stride, const float *keys, int64_t key_stride, const float *values,
                   int64_t value_stride, float *out, int32_t n_threads) {
  AttentionCall call{a, batch, queries, query_stride, keys, key_stride, values, value_stride, out};
  int64_t group = a.n_heads / a.n_kv_heads, step = std::max<int64_t>(1, kTileQueries / group), work = 0;
  std::vector<AttentionItem> items;
  for (int64_t request = 0; request < batch.n_requests; ++request) {
    int64_t n = batch.query_offsets[request + 1] - batch.query_offsets[request];
    int64_t n_keys = batch.key_offsets[request + 1] - batch.key_offsets[request];
    work += n * n_keys * a.n_heads * a.head_dim;
    for (int64_t begin = 0; begin < n; begin += step)
      for (int64_t head = 0; head < a.n_kv_heads; ++head)
        items.push_back({request, begin, std::min(begin + step, n), head});
  }
  static thread_local AttentionScratch local;
  if (work < kSerialWork || n_threads < 2) {
    for (const AttentionItem &item : items) attend_item(call, item, local);
  } else {
    fk::parallel(int64_t(items.size()), n_threads, [&](int64_t i) {
      static thread_local AttentionScratch scratch;
      attend_item(call, items[i], scratch);
    });
  }
  int64_t rows = batch.query_offsets[batch.n_requests], width = a.n_kv_heads * a.head_dim;
  write_slots(a.k_cache, a.cache_dtype, batch.write_index, rows, width, keys, key_stride);
  write_slots(a.v_cache, a.cache_dtype, batch.write_index, rows, width, values, value_stride);
}

static void normalize(const fk_norm &norm, const float *from, int64_t stride, int64_t rows, float *to,
                      int64_t to_stride) {
  int64_t width = norm.width, whole = width / L * L;
  for (int64_t r = 0; r < rows; ++r, from += stride, to += to_stride) {
    vf squares{};
    for (int64_t i = 0; i < whole; i += L) {
      vf x = load<vf>(from + i);
      squares += x * x;
    }
    float sum = horizontal_sum(squares);
    for (int64_t i = whole; i < width; ++i) sum += from[i] * from[i];
    float factor = 1.0f / std::sqrt(sum / float(width) + norm.epsilon);
    for (int64_t i = 0; i < whole; i += L)
      store(to + i, load<vf>(from + i) * splat(factor) * load<vf>(norm.weight + i));
    for (int64_t i = whole; i < width; ++i) to[i] = from[i] * factor * norm.weight[i];
  }
}

static void gate(int32_t activation, const float *gates, const float *ups, int64_t count, float *to) {
  fk_gating gating{};
  gating.activation = activation;
  gating.is_gated = 1;
  int64_t whole = count / L * L;
  for (int64_t i = 0; i < whole; i += L)
    store(to + i, gate_times_up(gating, load<vf>(gates + i), load<vf>(ups + i)));
  if (whole == count) return;
  float g[L] = {}, u[L] = {}, result[L];
  std::memcpy(g, gates + whole, (count - whole) * sizeof(float));
  std::memcpy(u, ups + whole, (count - whole) * sizeof(float));
  store(result, gate_times_up(gating, load<vf>(g), load<vf>(u)));
  std::memcpy(to + whole, result, (count - whole) * sizeof(float));
}

constexpr int64_t kHighestChunk = 1024;

// The highest of some scores, or NaN if one is, and the first place where it is found.
static void find_highest(const float *scores, int64_t count, float *peak, int32_t *index) {
  float highest = -INFINITY;
  bool is_any_nan = false;
  int64_t found = 0;  // first score of the chunk with the highest
  for (int64_t begin = 0; begin < count; begin += kHighestChunk) {
    int64_t end = std::min(begin + kHighestChunk, count), i = begin;
    vf best = splat(-INFINITY), sum{};
    for (; i + L <= end; i += L) {
      vf x = load<vf>(scores + i);
      best = x > best ? x : best;
      sum += x * 0.0f;  // NaN where x is, and where it is infinite
    }
    float values[L], sums[L], of_chunk = -INFINITY;
    store(values, best);
    store(sums, sum);
    bool is_doubtful = false;
    for (int64_t lane = 0; lane < L; ++lane) {
      of_chunk = std::max(of_chunk, values[lane]);
      is_doubtful |= std::isnan(sums[lane]);
    }
    for (; i < end; ++i) {
      of_chunk = scores[i] > of_chunk ? scores[i] : of_chunk;
      is_doubtful |= std::isnan(scores[i]);
    }
    if (is_doubtful) is_any_nan |= std::any_of(scores + begin, scores + end, [](float x) { return std::isnan(x); });
    if (of_chunk > highest) {
      highest = of_chunk;
      found = begin;
    }
  }
  while (found + 1 < count && scores[found] != highest) ++found;
  *peak = is_any_nan ? NAN : highest;
  *index = int32_t(found);
}

static void add_scaled(const float *from, float scale, int64_t count, float *to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i] * scale;
}

}  // namespace FK_NAMESPACE
