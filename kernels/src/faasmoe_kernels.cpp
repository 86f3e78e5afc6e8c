// Validates arguments and dispatches to the best instruction set of this CPU.
#include "faasmoe_kernels.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "isa_table.h"
#include "router_ops.h"

namespace {

bool is_supported(const fk::Isa *isa) {
#if defined(FK_WITH_X86)
  if (isa == &fk_isa_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == &fk_isa_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && is_supported(&fk_isa_avx2);
  if (isa == &fk_isa_avx512_bf16)
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           is_supported(&fk_isa_avx512);
#endif
  return isa != nullptr;
}

const fk::Isa *const kIsas[] = {  // best first
#if defined(FK_WITH_X86)
    &fk_isa_avx512_bf16, &fk_isa_avx512, &fk_isa_avx2,
#endif
#if defined(FK_WITH_NEON)
    &fk_isa_neon,
#endif
    &fk_isa_portable,
};

const fk::Isa *best() {
  for (const fk::Isa *isa : kIsas)
    if (is_supported(isa)) return isa;
  return &fk_isa_portable;
}

std::atomic<const fk::Isa *> chosen{nullptr};

const fk::Isa *current() {
  const fk::Isa *isa = chosen.load(std::memory_order_relaxed);
  if (isa) return isa;
  chosen.store(isa = best(), std::memory_order_relaxed);
  return isa;
}

using fk::check_matrix;

constexpr int64_t kMaxSize = int64_t(1) << 31;  // of one dimension; products fit 64 bits

thread_local char last_error[256] = "";

// Records what was wrong with an argument.
__attribute__((format(printf, 1, 2))) int32_t reject(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return FK_E_ARGUMENT;
}

int32_t finish(int32_t status) {
  if (status == FK_E_MEMORY)
    std::snprintf(last_error, sizeof last_error, "memory: scratch memory could not be allocated");
  return status;
}

int32_t check_size(const char *owner, const char *name, int64_t value) {
  if (value > 0 && value <= kMaxSize) return 0;
  return reject("%s%s: got %lld, expected 1 to %lld", owner, name, (long long)value, (long long)kMaxSize);
}

int32_t check_pointer(const char *owner, const char *name, const void *pointer) {
  return pointer ? 0 : reject("%s%s: got NULL, expected an address", owner, name);
}

int32_t check_dtype(const char *name, int32_t dtype) {
  if (dtype >= FK_FLOAT32 && dtype <= FK_FLOAT16) return 0;
  return reject("%s: got %d, expected a value of fk_dtype (0 to %d)", name, dtype, FK_FLOAT16);
}

// `beyond` is the one type beyond the floats that the parameter may have, or -1.
int32_t check_parameter(const char *owner, const char *name, int32_t dtype, int32_t beyond, const char *expected) {
  if ((dtype >= FK_P_FLOAT32 && dtype <= FK_P_FLOAT16) || dtype == beyond) return 0;
  return reject("%s%s: got %d, expected %s", owner, name, dtype, expected);
}

int32_t check_call(const void *x, int32_t x_dtype, int64_t x_stride, int64_t k, int64_t rows, const void *out,
                   int32_t out_dtype, int64_t out_stride, int64_t n, int32_t n_threads) {
  if (int32_t e = check_pointer("", "x", x)) return e;
  if (int32_t e = check_pointer("", "out", out)) return e;
  if (int32_t e = check_dtype("x_dtype", x_dtype)) return e;
  if (int32_t e = check_dtype("out_dtype", out_dtype)) return e;
  if (rows < 0 || rows > kMaxSize)
    return reject("rows: got %lld, expected 0 to %lld", (long long)rows, (long long)kMaxSize);
  if (x_stride < k)
    return reject("x_stride: got %lld, expected at least %lld", (long long)x_stride, (long long)k);
  if (out_stride < n)
    return reject("out_stride: got %lld, expected at least %lld", (long long)out_stride, (long long)n);
  if (n_threads < 1) return reject("n_threads: got %d, expected at least 1", n_threads);
  return 0;
}

int32_t check_gating(const fk_gating &g) {
  if (g.activation < FK_SILU || g.activation > FK_CLAMPED_SWIGLU)
    return reject("gating.activation: got %d, expected a value of fk_activation (0 to %d)", g.activation,
                  FK_CLAMPED_SWIGLU);
  if (!g.is_gated && g.activation == FK_CLAMPED_SWIGLU)
    return reject("gating.is_gated: got 0, expected 1 for FK_CLAMPED_SWIGLU");
  return 0;
}

int32_t check_pairs(const fk_pairs &p, int64_t rows, bool is_reduced) {
  if (p.n_groups < 1 || p.n_groups > kMaxSize)
    return reject("pairs.n_groups: got %lld, expected 1 to %lld", (long long)p.n_groups, (long long)kMaxSize);
  if (int32_t e = check_pointer("pairs.", "group_sizes", p.group_sizes)) return e;
  if (int32_t e = check_pointer("pairs.", "rows", p.rows)) return e;
  if (int32_t e = check_pointer("pairs.", "weights", p.weights)) return e;
  if (!is_reduced)
    if (int32_t e = check_pointer("pairs.", "positions", p.positions)) return e;
  if (is_reduced && p.positions)
    if (int32_t e = check_size("pairs.", "n_out", p.n_out)) return e;
  int64_t n = 0;
  for (int64_t g = 0; g < p.n_groups; ++g) {
    if (int32_t e = check_size("pairs.", "group_sizes", p.group_sizes[g])) return e;
    n += p.group_sizes[g];
  }
  for (int64_t i = 0; i < n; ++i) {
    if (p.rows[i] < 0 || p.rows[i] >= rows)
      return reject("pairs.rows: got %lld, expected 0 to %lld", (long long)p.rows[i], (long long)rows - 1);
    int64_t n_out = is_reduced ? p.n_out : n;
    if (p.positions && (p.positions[i] < 0 || p.positions[i] >= n_out))
      return reject("pairs.positions: got %lld, expected 0 to %lld", (long long)p.positions[i],
                    (long long)n_out - 1);
  }
  return 0;
}

// The two projections of one expert; all experts of a call have the shape of the first.
int32_t check_expert(const fk_matrix &first, const fk_matrix &down, bool is_gated, int64_t h, int64_t i) {
  if (int32_t e = check_matrix("first.", first)) return e;
  if (int32_t e = check_matrix("down.", down)) return e;
  int64_t wide = is_gated ? 2 * i : i;
  if (first.n != wide || first.k != h)
    return reject("first: got [%lld, %lld], expected [%lld, %lld]", (long long)first.n, (long long)first.k,
                  (long long)wide, (long long)h);
  if (down.n != h || down.k != i)
    return reject("down: got [%lld, %lld], expected [%lld, %lld]", (long long)down.n, (long long)down.k,
                  (long long)h, (long long)i);
  return 0;
}

int32_t check_halves(const char *owner, const fk_matrix &m) {
  if ((m.scales_upper || m.factors_upper) && m.n % 2)
    return reject("%sn: got %lld, expected an even number for scales in two places", owner, (long long)m.n);
  if (m.zeros) return reject("%szeros: got an address, expected NULL for scheme %d", owner, m.scheme);
  return 0;
}

int32_t check_fp8(const char *owner, const fk_matrix &m) {
  if (m.group < 0 || m.group % 32)
    return reject("%sgroup: got %d, expected 0 or a multiple of 32", owner, m.group);
  if (m.group_rows < 0) return reject("%sgroup_rows: got %d, expected at least 0", owner, m.group_rows);
  return check_halves(owner, m);
}

int32_t check_nvfp4(const char *owner, const fk_matrix &m) {
  if (m.scale_dtype != FK_P_E4M3)
    return reject("%sscale_dtype: got %d, expected %d (E4M3) for NVFP4", owner, m.scale_dtype, FK_P_E4M3);
  if (m.group != 16) return reject("%sgroup: got %d, expected 16 for NVFP4", owner, m.group);
  if (m.k % 16)
    return reject("%sk: got %lld, expected a multiple of 16 for NVFP4", owner, (long long)m.k);
  return check_halves(owner, m);
}

}  // namespace

namespace fk {

// `owner` is a prefix such as "first."
int32_t check_matrix(const char *owner, const fk_matrix &m) {
  if (m.scheme < FK_W_FLOAT32 || m.scheme > FK_W_NVFP4)
    return reject("%sscheme: got %d, expected a value of fk_scheme (0 to %d)", owner, m.scheme, FK_W_NVFP4);
  if (int32_t e = check_size(owner, "n", m.n)) return e;
  if (int32_t e = check_size(owner, "k", m.k)) return e;
  if (int32_t e = check_pointer(owner, "codes", m.codes)) return e;
  if (m.codes_upper && m.n % 2)
    return reject("%sn: got %lld, expected an even number for rows in two places", owner, (long long)m.n);
  if (m.bias)
    if (int32_t e = check_parameter(owner, "bias_dtype", m.bias_dtype, -1, "0 to 2 (float32, bfloat16, float16)"))
      return e;
  if (m.scheme != FK_W_FP8 && (m.group_rows < 0 || m.group_rows > 1))
    return reject("%sgroup_rows: got %d, expected 0 or 1 for scheme %d", owner, m.group_rows, m.scheme);
  if (m.scheme < FK_W_INT8 && m.scales_upper)
    return reject("%sscales_upper: got an address, expected NULL for scheme %d", owner, m.scheme);
  if (m.scheme != FK_W_NVFP4 && (m.factors || m.factors_upper))
    return reject("%sfactors: got an address, expected NULL for scheme %d", owner, m.scheme);
  if (m.scheme < FK_W_INT8) return 0;
  if (int32_t e = check_pointer(owner, "scales", m.scales)) return e;
  if (m.scheme == FK_W_NVFP4) return check_nvfp4(owner, m);
  if (int32_t e = check_parameter(owner, "scale_dtype", m.scale_dtype, FK_P_E8M0,
                                  "0 to 3 (float32, bfloat16, float16, E8M0)"))
    return e;
  if (m.zeros)
    if (int32_t e = check_parameter(owner, "zero_dtype", m.zero_dtype, FK_P_UINT8,
                                    "0 to 2 or 4 (float32, bfloat16, float16, uint8)"))
      return e;
  if (m.scheme == FK_W_FP8) return check_fp8(owner, m);
  if (m.group < 0 || m.group % 32 || (m.group && m.k % m.group))
    return reject("%sgroup: got %d, expected 0 or a multiple of 32 that divides k (%lld)", owner, m.group,
                  (long long)m.k);
  if (m.scheme == FK_W_MXFP4 && m.group != 32)
    return reject("%sgroup: got %d, expected 32 for MXFP4", owner, m.group);
  if (m.scheme != FK_W_INT8 && m.k % 2)
    return reject("%sk: got %lld, expected an even number for 4-bit codes", owner, (long long)m.k);
  if (m.zeros && m.scheme == FK_W_MXFP4)
    return reject("%szeros: got an address, expected NULL for scheme %d", owner, m.scheme);
  if (m.scales_upper && (m.n % 2 || m.zeros))
    return reject("%sscales_upper: got an address, expected NULL with zeros or an odd n (%lld)", owner,
                  (long long)m.n);
  return 0;
}

int32_t reject_argument(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return FK_E_ARGUMENT;
}

}  // namespace fk

#define FK_EXPORT __attribute__((visibility("default")))

extern "C" {

FK_EXPORT int32_t fk_abi_version(void) { return FK_ABI_VERSION; }

FK_EXPORT const char *fk_last_error(void) { return last_error; }

FK_EXPORT const char *fk_isa(void) { return current()->name; }

FK_EXPORT int32_t fk_set_isa(const char *name) {
  for (const fk::Isa *isa : kIsas)
    if (name && !std::strcmp(isa->name, name) && is_supported(isa)) {
      chosen.store(isa);
      return 0;
    }
  return reject("isa: got \"%s\", which this CPU or build does not support", name ? name : "NULL");
}

FK_EXPORT int32_t fk_linear(const fk_matrix *w, const void *x, int32_t x_dtype, int64_t x_stride,
                            int64_t rows, void *out, int32_t out_dtype, int64_t out_stride,
                            int32_t n_threads) {
  if (int32_t e = check_pointer("", "w", w)) return e;
  if (int32_t e = check_matrix("w.", *w)) return e;
  if (int32_t e = check_call(x, x_dtype, x_stride, w->k, rows, out, out_dtype, out_stride, w->n, n_threads))
    return e;
  if (rows == 0) return 0;
  return finish(current()->linear(*w, x, x_dtype, x_stride, rows, out, out_dtype, out_stride, n_threads));
}

FK_EXPORT int32_t fk_experts(const fk_matrix *first, const fk_matrix *down, const fk_gating *gating,
                             const fk_pairs *pairs, const void *x, int32_t x_dtype, int64_t x_stride,
                             int64_t rows, int32_t reduction, void *out, int32_t out_dtype,
                             int64_t out_stride, int32_t n_threads) {
  if (int32_t e = check_pointer("", "first", first)) return e;
  if (int32_t e = check_pointer("", "down", down)) return e;
  if (int32_t e = check_pointer("", "gating", gating)) return e;
  if (int32_t e = check_pointer("", "pairs", pairs)) return e;
  if (int32_t e = check_gating(*gating)) return e;
  if (reduction < FK_UNREDUCED || reduction > FK_ADDED)
    return reject("reduction: got %d, expected 0 to 2 (unreduced, reduced, added)", reduction);
  if (int32_t e = check_pairs(*pairs, rows, reduction)) return e;
  int64_t h = first->k, i = down->k;
  if (reduction == FK_ADDED && (out_dtype != FK_FLOAT32 || out_stride != h))
    return reject("out: got dtype %d and a stride of %lld, expected float32 and %lld to add to it", out_dtype,
                  (long long)out_stride, (long long)h);
  for (int64_t g = 0; g < pairs->n_groups; ++g)
    if (int32_t e = check_expert(first[g], down[g], gating->is_gated, h, i)) return e;
  if (int32_t e = check_call(x, x_dtype, x_stride, h, rows, out, out_dtype, out_stride, h, n_threads)) return e;
  return finish(current()->experts(first, down, *gating, *pairs, x, x_dtype, x_stride, rows,
                                   reduction, out, out_dtype, out_stride, n_threads));
}

}  // extern "C"
