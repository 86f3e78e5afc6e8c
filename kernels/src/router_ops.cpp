// Validates attention's arguments and dispatches to the instruction set in use.
#include "router_ops.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

namespace fk {

const RouterOps &router_ops() {
  const char *name = fk_isa();
#if defined(FK_WITH_X86)
  if (!std::strcmp(name, "avx512_bf16")) return fk_router_ops_avx512_bf16;
  if (!std::strcmp(name, "avx512")) return fk_router_ops_avx512;
  if (!std::strcmp(name, "avx2")) return fk_router_ops_avx2;
#endif
#if defined(FK_WITH_NEON)
  if (!std::strcmp(name, "neon")) return fk_router_ops_neon;
#endif
  (void)name;
  return fk_router_ops_portable;
}

static int32_t check_attention(const fk_attention &a) {
  if (a.n_kv_heads < 1 || a.n_heads < 1 || a.n_heads % a.n_kv_heads)
    return reject_argument("attention.n_heads: got %lld, expected a multiple of n_kv_heads (%lld)",
                           (long long)a.n_heads, (long long)a.n_kv_heads);
  if (a.head_dim < 1 || a.head_dim > 4096)
    return reject_argument("attention.head_dim: got %lld, expected 1 to 4096", (long long)a.head_dim);
  if (a.window < 0) return reject_argument("attention.window: got %lld, expected 0 or more", (long long)a.window);
  if (!a.k_cache || !a.v_cache) return reject_argument("attention: k_cache and v_cache: got NULL, expected addresses");
  if (a.cache_dtype < FK_FLOAT32 || a.cache_dtype > FK_FLOAT16)
    return reject_argument("attention.cache_dtype: got %d, expected a value of fk_dtype (0 to %d)", a.cache_dtype, FK_FLOAT16);
  return 0;
}

static int32_t check_slots(const char *name, const int64_t *slots, int64_t count, int64_t n_slots) {
  for (int64_t i = 0; i < count; ++i)
    if (slots[i] < 0 || slots[i] >= n_slots)
      return reject_argument("%s: got slot %lld, expected 0 to %lld", name, (long long)slots[i], (long long)n_slots - 1);
  return 0;
}

int32_t check_batch(const fk_attention &a, const fk_attention_batch &b, int64_t rows) {
  if (int32_t e = check_attention(a)) return e;
  if (b.n_requests < 1 || !b.query_offsets || !b.key_offsets || !b.write_index)
    return reject_argument("batch: got no requests, offsets or write_index, expected at least one request");
  if (b.query_offsets[0] || b.key_offsets[0]) return reject_argument("batch: offsets: expected the first to be 0");
  for (int64_t r = 0; r < b.n_requests; ++r) {
    int64_t queries = int64_t(b.query_offsets[r + 1]) - b.query_offsets[r];
    int64_t keys = int64_t(b.key_offsets[r + 1]) - b.key_offsets[r];
    if (queries < 0 || keys < queries)
      return reject_argument("batch.key_offsets: got %lld keys for %lld queries of request %lld, expected at least as many",
                             (long long)keys, (long long)queries, (long long)r);
    if (keys > queries) {
      if (!b.read_index) return reject_argument("batch.read_index: got NULL, expected the slots of cached keys");
      if (int32_t e = check_slots("batch.read_index", b.read_index + b.key_offsets[r], keys - queries, a.n_slots)) return e;
    }
  }
  if (rows >= 0 && b.query_offsets[b.n_requests] != rows)
    return reject_argument("batch.query_offsets: got %d rows, expected %lld", b.query_offsets[b.n_requests], (long long)rows);
  return check_slots("batch.write_index", b.write_index, b.query_offsets[b.n_requests], a.n_slots);
}

}  // namespace fk

#define FK_EXPORT __attribute__((visibility("default")))

extern "C" FK_EXPORT int32_t fk_paged_attention(const fk_attention *attention, const fk_attention_batch *batch,
                                                const float *queries, int64_t query_stride, const float *keys,
                                                int64_t key_stride, const float *values, int64_t value_stride,
                                                float *out, int32_t n_threads) {
  if (!attention || !batch || !queries || !keys || !values || !out)
    return fk::reject_argument("attention, batch, queries, keys, values or out: got NULL, expected an address");
  if (int32_t e = fk::check_batch(*attention, *batch, -1)) return e;
  int64_t width = attention->n_kv_heads * attention->head_dim;
  if (query_stride < attention->n_heads * attention->head_dim || key_stride < width || value_stride < width)
    return fk::reject_argument("query_stride, key_stride or value_stride: got less than the width of a row");
  try {
    fk::router_ops().attend(*attention, *batch, queries, query_stride, keys, key_stride, values, value_stride, out,
                            n_threads);
  } catch (const std::bad_alloc &) {
    return FK_E_MEMORY;
  }
  return 0;
}
