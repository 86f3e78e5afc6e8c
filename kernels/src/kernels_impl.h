// The kernels for one instruction set. Included by src/isa_*.cpp, which define
//   FK_NAMESPACE  name of the enclosing namespace
//   FK_LANES      float32 lanes of a vector register
//   FK_COLUMNS_1  weight rows that are multiplied at once by a single input row
//   FK_COLUMNS    the same for several input rows (at most FK_MAX_ROWS of them)
//   FK_MAX_ROWS
// and are compiled with that instruction set enabled. GCC's and Clang's vector extensions keep the
// source the same for all of them.
//
// Every output is one vector accumulator over k, in ascending order, and one horizontal sum at the
// end. How many rows or columns are computed at once changes no bit of it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "faasmoe_kernels.h"
#include "thread_pool.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace FK_NAMESPACE {

constexpr int L = FK_LANES;
typedef float vf __attribute__((vector_size(L * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(L * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(L * 4), aligned(4)));
typedef int8_t vb __attribute__((vector_size(L), aligned(1)));
typedef uint8_t vub __attribute__((vector_size(L), aligned(1)));

template <class T>
static inline T load(const void *p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float *p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float s) { return vf{} + s; }

// Bytes as int32 lanes. GCC splits __builtin_convertvector of such narrow vectors into scalars.
static inline vi widen(vb bytes) {
#if defined(__AVX512F__) && FK_LANES == 16
  return (vi)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__) && FK_LANES == 8
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)&bytes));
#else
  return __builtin_convertvector(bytes, vi);
#endif
}
static inline vi widen(vub bytes) {
#if defined(__AVX512F__) && FK_LANES == 16
  return (vi)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__) && FK_LANES == 8
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)&bytes));
#else
  return __builtin_convertvector(bytes, vi);
#endif
}

static inline float horizontal_sum(vf v) {
  float lanes[L];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = L / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

static inline float from_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline uint16_t to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
static inline float from_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa == 0) {
    bits = sign;
  } else {  // subnormal: normalise
    int shift = 0;
    while (!(mantissa & 0x400)) mantissa <<= 1, ++shift;
    bits = sign | (uint32_t(113 - shift) << 23) | ((mantissa & 0x3ff) << 13);
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline uint16_t to_f16(float f) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // subnormal or zero: add a power of two that aligns the mantissa
    float scaled;
    std::memcpy(&scaled, &magnitude, 4);
    scaled += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &scaled, 4);
    return uint16_t(sign | (rounded - 0x3f000000u));
  }
  uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

static inline float from_e8m0(uint8_t code) {
  uint32_t bits = code == 255 ? 0x7fc00000u : code == 0 ? 0x00400000u : uint32_t(code) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Element i of scales, zero points or biases.
static inline float parameter(const void *p, int32_t dtype, int64_t i) {
  const uint8_t *bytes = (const uint8_t *)p;
  switch (dtype) {
    case FK_P_FLOAT32: return load<float>(bytes + 4 * i);
    case FK_P_BFLOAT16: return from_bf16(load<uint16_t>(bytes + 2 * i));
    case FK_P_FLOAT16: return from_f16(load<uint16_t>(bytes + 2 * i));
    case FK_P_E8M0: return from_e8m0(bytes[i]);
    default: return float(bytes[i]);  // FK_P_UINT8
  }
}

// Weight decoders. A block is `kBlock` consecutive columns and decodes to kBlock / L vectors, in the
// decoder's own column order: `column(i)` is the column of a block that stands at place i. Inputs
// are stored in that order too, so no lane has to be moved while weights are streamed.
//
// `Group` is what the weights of one group have in common, prepared once from its scale and zero.

struct NoGroup {
  static inline NoGroup of(float, float) { return {}; }
};

struct Float32 {
  static constexpr int kBlock = L;
  static constexpr int kBytes = 4 * L;
  static constexpr bool kGrouped = false;
  using Group = NoGroup;
  static int column(int i) { return i; }
  static inline void decode(const uint8_t *p, const Group &, vf *w) { w[0] = load<vf>(p); }
  static inline float at(const uint8_t *row, int64_t j, float, float) { return load<float>(row + 4 * j); }
};

struct Float32Tile : Float32 {};  // weights that were decoded before, in their decoder's order

struct BFloat16 {  // even columns, then odd ones: a shift and a mask decode two vectors
  static constexpr int kBlock = 2 * L;
  static constexpr int kBytes = 4 * L;
  static constexpr bool kGrouped = false;
  using Group = NoGroup;
  static int column(int i) { return i < L ? 2 * i : 2 * (i - L) + 1; }
  static inline void decode(const uint8_t *p, const Group &, vf *w) {
    vu bits = load<vu>(p);
    w[0] = (vf)(bits << 16);
    w[1] = (vf)(bits & 0xffff0000u);
  }
  static inline float at(const uint8_t *row, int64_t j, float, float) {
    return from_bf16(load<uint16_t>(row + 2 * j));
  }
};

struct Float16 {
  static constexpr int kBlock = L;
  static constexpr int kBytes = 2 * L;
  static constexpr bool kGrouped = false;
  using Group = NoGroup;
  static int column(int i) { return i; }
  static inline void decode(const uint8_t *p, const Group &, vf *w) {
#if defined(__AVX512F__) && FK_LANES == 16
    w[0] = (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__) && FK_LANES == 8
    w[0] = (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    float lanes[L];
    for (int i = 0; i < L; ++i) lanes[i] = from_f16(load<uint16_t>(p + 2 * i));
    w[0] = load<vf>(lanes);
#endif
  }
  static inline float at(const uint8_t *row, int64_t j, float, float) {
    return from_f16(load<uint16_t>(row + 2 * j));
  }
};

struct ScaledGroup {
  float scale;
  static inline ScaledGroup of(float scale, float) { return {scale}; }
};

struct Int8 {  // one scale per group
  static constexpr int kBlock = L;
  static constexpr int kBytes = L;
  static constexpr bool kGrouped = true;
  using Group = ScaledGroup;
  static int column(int i) { return i; }
  static inline void decode(const uint8_t *p, const Group &g, vf *w) {
    w[0] = __builtin_convertvector(widen(load<vb>(p)), vf) * splat(g.scale);
  }
  static inline float at(const uint8_t *row, int64_t j, float scale, float) {
    return float(int8_t(row[j])) * scale;
  }
};

struct Int8PerRow {  // one scale per row, which multiplies the finished sum
  static constexpr int kBlock = L;
  static constexpr int kBytes = L;
  static constexpr bool kGrouped = false;
  using Group = NoGroup;
  static int column(int i) { return i; }
  static inline void decode(const uint8_t *p, const Group &, vf *w) {
    w[0] = __builtin_convertvector(widen(load<vb>(p)), vf);
  }
  static inline float at(const uint8_t *row, int64_t j, float, float) { return float(int8_t(row[j])); }
};

static inline int nibble(const uint8_t *row, int64_t j) { return (row[j / 2] >> (j % 2 * 4)) & 15; }

// 4-bit codes, two to a byte: low nibbles are the even columns. With 16 lanes the 16 values of a
// group are looked up in one register; the lookup ignores all but the low 4 bits of a lane.
#if defined(__AVX512F__) && FK_LANES == 16
struct NibbleTable {
  vf values;
  static inline void decode(const uint8_t *p, const NibbleTable &g, vf *w) {
    __m512i codes = (__m512i)widen(load<vub>(p));
    w[0] = (vf)_mm512_permutexvar_ps(codes, (__m512)g.values);
    w[1] = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), (__m512)g.values);
  }
};
#endif

struct Int4 {
  static constexpr int kBlock = 2 * L;
  static constexpr int kBytes = L;
  static constexpr bool kGrouped = true;
  static int column(int i) { return i < L ? 2 * i : 2 * (i - L) + 1; }
#if defined(__AVX512F__) && FK_LANES == 16
  struct Group : NibbleTable {
    static inline Group of(float scale, float zero) {
      const vf codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      return {(codes - splat(zero)) * splat(scale)};
    }
  };
  static inline void decode(const uint8_t *p, const Group &g, vf *w) { NibbleTable::decode(p, g, w); }
#elif defined(__AVX2__) && FK_LANES == 8
  struct Group {
    float scale, offset;
    static inline Group of(float scale, float zero) { return {scale, -zero * scale}; }
  };
  static inline void decode(const uint8_t *p, const Group &g, vf *w) {
    vi codes = widen(load<vub>(p));
    __m256 scale = _mm256_set1_ps(g.scale), offset = _mm256_set1_ps(g.offset);
    w[0] = (vf)_mm256_fmadd_ps((__m256)__builtin_convertvector(codes & 15, vf), scale, offset);
    w[1] = (vf)_mm256_fmadd_ps((__m256)__builtin_convertvector(codes >> 4, vf), scale, offset);
  }
#else
  struct Group {
    float scale, zero;
    static inline Group of(float scale, float zero) { return {scale, zero}; }
  };
  static inline void decode(const uint8_t *p, const Group &g, vf *w) {
    vi codes = widen(load<vub>(p));
    w[0] = (__builtin_convertvector(codes & 15, vf) - splat(g.zero)) * splat(g.scale);
    w[1] = (__builtin_convertvector(codes >> 4, vf) - splat(g.zero)) * splat(g.scale);
  }
#endif
  static inline float at(const uint8_t *row, int64_t j, float scale, float zero) {
    return (float(nibble(row, j)) - zero) * scale;
  }
};

struct MxFp4 {  // E2M1: sign, two exponent bits, one mantissa bit
  static constexpr int kBlock = 2 * L;
  static constexpr int kBytes = L;
  static constexpr bool kGrouped = true;
  static int column(int i) { return i < L ? 2 * i : 2 * (i - L) + 1; }
#if defined(__AVX512F__) && FK_LANES == 16
  struct Group : NibbleTable {
    static inline Group of(float scale, float) {
      const vf values = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
      return {values * splat(scale)};
    }
  };
  static inline void decode(const uint8_t *p, const Group &g, vf *w) { NibbleTable::decode(p, g, w); }
#elif defined(__AVX2__) && FK_LANES == 8
  struct Group {
    vf magnitudes;
    static inline Group of(float scale, float) {
      const vf values = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
      return {values * splat(scale)};
    }
  };
  static inline void decode(const uint8_t *p, const Group &g, vf *w) {
    vi low = widen(load<vub>(p)), high = low >> 4;
    const vi sign = vi{} + INT32_MIN;
    // The lookup ignores all but the low 3 bits of a lane; bit 3 is the sign.
    w[0] = (vf)((vi)_mm256_permutevar8x32_ps((__m256)g.magnitudes, (__m256i)low) ^ ((low << 28) & sign));
    w[1] = (vf)((vi)_mm256_permutevar8x32_ps((__m256)g.magnitudes, (__m256i)high) ^ ((high << 28) & sign));
  }
#else
  using Group = ScaledGroup;
  static inline vf value(vi code) {
    // Exponent and mantissa moved to float32's places, the bias adjusted. 0 and 0.5 have exponent 0.
    vi magnitude = code & 7, is_small = magnitude < 2;
    vi bits = is_small ? (magnitude == 1) & 0x3f000000 : (magnitude << 22) + (126 << 23);
    return (vf)(bits | ((code & 8) << 28));
  }
  static inline void decode(const uint8_t *p, const Group &g, vf *w) {
    vi codes = widen(load<vub>(p));
    w[0] = value(codes & 15) * splat(g.scale);
    w[1] = value(codes >> 4) * splat(g.scale);
  }
#endif
  static inline float at(const uint8_t *row, int64_t j, float scale, float) {
    static const float values[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    int code = nibble(row, j);
    return (code & 8 ? -values[code & 7] : values[code & 7]) * scale;
  }
};

constexpr int kPrefetchBytes = 4096;  // into the second-level cache, where the distance hardly matters
constexpr int kCacheLineBytes = 64;
constexpr int64_t kTileColumns = 16;  // weight rows that are decoded together for many input rows
constexpr int64_t kTileFromRows = 3 * FK_MAX_ROWS;

// One matrix prepared for a call: pointers and sizes of what a thread streams.
template <class D>
struct Weights {
  const uint8_t *codes;
  const void *scales = nullptr, *zeros = nullptr;  // of groups; NULL if D has none
  const void *row_scales = nullptr;                // multiply finished sums; NULL: none
  int64_t first_row = 0;                           // of row_scales
  int32_t scale_dtype, zero_dtype;
  int64_t row_bytes, k, blocks, group_blocks, groups = 1;

  explicit Weights(const fk_matrix &m) {
    codes = (const uint8_t *)m.codes;
    scale_dtype = m.scale_dtype;
    zero_dtype = m.zero_dtype;
    k = m.k;
    row_bytes = k / D::kBlock * D::kBytes + (k % D::kBlock) * D::kBytes / D::kBlock;
    group_blocks = blocks = k / D::kBlock;
    if (D::kGrouped) {
      scales = m.scales;
      zeros = m.zeros;
      if (m.group) groups = k / m.group;
      if (groups > 1) group_blocks = m.group / D::kBlock;
    } else if (std::is_same<D, Int8PerRow>::value) {
      row_scales = m.scales;
    }
  }
  float scale(int64_t row, int64_t g) const { 
    return D::kGrouped ? parameter(scales, scale_dtype, row * groups + g) : 1.0f;
  }
  float zero(int64_t row, int64_t g) const { 
    return zeros ? parameter(zeros, zero_dtype, row * groups + g) : 8.0f;
  }
  typename D::Group group(int64_t row, int64_t g) const { return D::Group::of(scale(row, g), zero(row, g)); }

  // One of the columns behind the last block. Only a row with a single group has such columns.
  float tail(int64_t row, int64_t column) const {
    return D::at(codes + row * row_bytes, column, scale(row, groups - 1), zero(row, groups - 1));
  }
};

// acc[r][c] += x_r . w_c over the blocks, for R input rows and C weight rows.
template <class D, int R, int C>
static inline void dot_blocks(const Weights<D> &w, int64_t c0, const float *x, int64_t x_stride,
                              vf (*acc)[C]) {
  constexpr int V = D::kBlock / L;
  const uint8_t *rows[C];
  for (int c = 0; c < C; ++c) rows[c] = w.codes + (c0 + c) * w.row_bytes;
  for (int64_t g = 0, b = 0; b < w.blocks; ++g) {
    typename D::Group group[C];
    for (int c = 0; c < C; ++c) group[c] = w.group(c0 + c, g);
    int64_t end = std::min(b + w.group_blocks, w.blocks);
    for (; b < end; ++b) {
      int64_t offset = b * D::kBytes;
      if (R == 1 && offset % kCacheLineBytes < D::kBytes) {
        // Rows may be short: behind a row's end, the row that is read next is C rows away.
        int64_t ahead = offset + kPrefetchBytes;
        if (ahead >= w.row_bytes) ahead += (C - 1) * w.row_bytes;
        for (int c = 0; c < C; ++c) __builtin_prefetch(rows[c] + ahead, 0, 2);
      }
      vf in[R][V];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) in[r][v] = load<vf>(x + r * x_stride + b * D::kBlock + v * L);
      for (int c = 0; c < C; ++c) {
        vf weight[V];
        D::decode(rows[c] + offset, group[c], weight);
        for (int v = 0; v < V; ++v)
          for (int r = 0; r < R; ++r) acc[r][c] += in[r][v] * weight[v];
      }
    }
  }
}

// out[r, c0 + c] for R input rows and C weight rows.
template <class D, int R, int C>
static inline void dot_tile(const Weights<D> &w, int64_t c0, const float *x, int64_t x_stride,
                            float *out, int64_t out_stride) {
  vf acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = vf{};
  dot_blocks<D, R, C>(w, c0, x, x_stride, acc);
  int64_t tail = w.blocks * D::kBlock;
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float sum = horizontal_sum(acc[r][c]);
      for (int64_t j = tail; j < w.k; ++j) sum = std::fma(x[r * x_stride + j], w.tail(c0 + c, j), sum);
      out[r * out_stride + c] = w.row_scales ? sum * parameter(w.row_scales, w.scale_dtype, w.first_row + c0 + c) : sum;
    }
}

template <class D, int R, int C>
static void dot_columns(const Weights<D> &w, int64_t begin, int64_t end, const float *x,
                        int64_t x_stride, float *out, int64_t out_stride) {
  int64_t c = begin;
  for (; c + C <= end; c += C)
    dot_tile<D, R, C>(w, c, x, x_stride, out + (c - begin), out_stride);
  for (; c < end; ++c) dot_tile<D, R, 1>(w, c, x, x_stride, out + (c - begin), out_stride);
}

// out[rows, begin:end] for any number of rows, weights decoded anew for each few of them.
template <class D>
static void dot_rows(const Weights<D> &w, int64_t begin, int64_t end, const float *x,
                     int64_t x_stride, int64_t rows, float *out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + FK_MAX_ROWS <= rows; r += FK_MAX_ROWS)
    dot_columns<D, FK_MAX_ROWS, FK_COLUMNS>(w, begin, end, x + r * x_stride, x_stride,
                                            out + r * out_stride, out_stride);
  const float *rest = x + r * x_stride;
  float *rest_out = out + r * out_stride;
  switch (rows - r) {
    case 1: dot_columns<D, 1, FK_COLUMNS_1>(w, begin, end, rest, x_stride, rest_out, out_stride); break;
    case 2: dot_columns<D, 2, FK_COLUMNS>(w, begin, end, rest, x_stride, rest_out, out_stride); break;
#if FK_MAX_ROWS > 3
    case 3: dot_columns<D, 3, FK_COLUMNS>(w, begin, end, rest, x_stride, rest_out, out_stride); break;
#endif
#if FK_MAX_ROWS > 4
    case 4: dot_columns<D, 4, FK_COLUMNS>(w, begin, end, rest, x_stride, rest_out, out_stride); break;
    case 5: dot_columns<D, 5, FK_COLUMNS>(w, begin, end, rest, x_stride, rest_out, out_stride); break;
#endif
    default: break;
  }
}

// The same for many rows: some weight rows are decoded to float32 once and multiplied from cache.
template <class D>
static void dot_many_rows(const Weights<D> &w, int64_t begin, int64_t end, const float *x,
                          int64_t x_stride, int64_t rows, float *out, int64_t out_stride,
                          float *tile) {
  constexpr int V = D::kBlock / L;
  fk_matrix decoded{};
  decoded.k = w.k;
  decoded.codes = tile;
  for (int64_t c0 = begin; c0 < end; c0 += kTileColumns) {
    int64_t count = std::min(kTileColumns, end - c0);
    for (int64_t c = 0; c < count; ++c) {
      const uint8_t *p = w.codes + (c0 + c) * w.row_bytes;
      float *to = tile + c * w.k;
      for (int64_t g = 0, b = 0; b < w.blocks; ++g) {
        typename D::Group group = w.group(c0 + c, g);
        for (int64_t e = std::min(b + w.group_blocks, w.blocks); b < e; ++b) {
          vf weight[V];
          D::decode(p + b * D::kBytes, group, weight);
          for (int v = 0; v < V; ++v) store(to + b * D::kBlock + v * L, weight[v]);
        }
      }
      for (int64_t j = w.blocks * D::kBlock; j < w.k; ++j) to[j] = w.tail(c0 + c, j);
    }
    Weights<Float32Tile> view(decoded);
    view.blocks = w.blocks * V;  // the tail begins where it does for the decoder itself
    view.group_blocks = view.blocks;
    view.row_scales = w.row_scales;
    view.scale_dtype = w.scale_dtype;
    view.first_row = c0;
    dot_rows<Float32Tile>(view, 0, count, x, x_stride, rows, out + (c0 - begin), out_stride);
  }
}

template <class D, class F>
static inline void arrange_row(int64_t k, float *to, F at) {
  int64_t whole = k / D::kBlock * D::kBlock;
  for (int64_t b = 0; b < whole; b += D::kBlock)
    for (int i = 0; i < D::kBlock; ++i) to[b + i] = at(b + D::column(i));
  for (int64_t j = whole; j < k; ++j) to[j] = at(j);
}

// Inputs as float32 in the decoder's column order.
template <class D>
static void arrange_input(const void *x, int32_t dtype, int64_t stride, int64_t rows, int64_t k,
                          float *to) {
  const uint8_t *from = (const uint8_t *)x;
  int64_t size = dtype == FK_FLOAT32 ? 4 : 2;
  for (int64_t r = 0; r < rows; ++r, from += stride * size, to += k) {
    if (dtype == FK_FLOAT32)
      arrange_row<D>(k, to, [&](int64_t j) { return load<float>(from + 4 * j); });
    else if (dtype == FK_BFLOAT16)
      arrange_row<D>(k, to, [&](int64_t j) { return from_bf16(load<uint16_t>(from + 2 * j)); });
    else
      arrange_row<D>(k, to, [&](int64_t j) { return from_f16(load<uint16_t>(from + 2 * j)); });
  }
}

static inline void write_output(const float *from, int64_t count, void *out, int32_t dtype,
                                int64_t offset) {
  uint8_t *to = (uint8_t *)out + offset * (dtype == FK_FLOAT32 ? 4 : 2);
  if (dtype == FK_FLOAT32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t half = dtype == FK_BFLOAT16 ? to_bf16(from[i]) : to_f16(from[i]);
    std::memcpy(to + 2 * i, &half, 2);
  }
}

// product[rows, n] (+ bias) = input[rows, k] (arranged) @ w^T, in parallel over n.
template <class D>
static int32_t multiply(const fk_matrix &m, const float *input, int64_t rows, float *product,
                        int32_t n_threads) {
  Weights<D> w(m);
  bool is_tiled = rows >= kTileFromRows && !std::is_same<D, Float32>::value;
  int64_t chunk = (m.n + n_threads - 1) / n_threads;
  chunk = (chunk + kTileColumns - 1) / kTileColumns * kTileColumns;
  int64_t n_chunks = (m.n + chunk - 1) / chunk;
  std::unique_ptr<float[]> tiles;
  if (is_tiled) {
    tiles.reset(new (std::nothrow) float[n_chunks * kTileColumns * m.k]);
    if (!tiles) return FK_E_MEMORY;
  }
  fk::parallel(n_chunks, n_threads, [&](int64_t i) {
    int64_t begin = i * chunk, end = std::min(begin + chunk, m.n);
    float *out = product + begin;
    if (is_tiled)
      dot_many_rows<D>(w, begin, end, input, m.k, rows, out, m.n, tiles.get() + i * kTileColumns * m.k);
    else
      dot_rows<D>(w, begin, end, input, m.k, rows, out, m.n);
    if (m.bias)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = begin; c < end; ++c) product[r * m.n + c] += parameter(m.bias, m.bias_dtype, c);
  });
  return 0;
}

template <class F>
static int32_t with_decoder(const fk_matrix &m, F &&f) {
  switch (m.scheme) {
    case FK_W_FLOAT32: return f(Float32{});
    case FK_W_BFLOAT16: return f(BFloat16{});
    case FK_W_FLOAT16: return f(Float16{});
    case FK_W_INT8: return m.group && m.group != m.k ? f(Int8{}) : f(Int8PerRow{});
    case FK_W_INT4: return f(Int4{});
    case FK_W_MXFP4: return f(MxFp4{});
    default: return FK_E_ARGUMENT;
  }
}

static int32_t arranged_multiply(const fk_matrix &m, const void *x, int32_t x_dtype, int64_t x_stride,
                                 int64_t rows, float *product, int32_t n_threads) {
  return with_decoder(m, [&](auto decoder) -> int32_t {
    using D = decltype(decoder);
    std::unique_ptr<float[]> input(new (std::nothrow) float[rows * m.k]);
    if (!input) return FK_E_MEMORY;
    arrange_input<D>(x, x_dtype, x_stride, rows, m.k, input.get());
    return multiply<D>(m, input.get(), rows, product, n_threads);
  });
}

static int32_t linear(const fk_matrix &w, const void *x, int32_t x_dtype, int64_t x_stride,
                      int64_t rows, void *out, int32_t out_dtype, int64_t out_stride,
                      int32_t n_threads) {
  std::unique_ptr<float[]> product(new (std::nothrow) float[rows * w.n]);
  if (!product) return FK_E_MEMORY;
  int32_t status = arranged_multiply(w, x, x_dtype, x_stride, rows, product.get(), n_threads);
  if (status) return status;
  for (int64_t r = 0; r < rows; ++r)
    write_output(product.get() + r * w.n, w.n, out, out_dtype, r * out_stride);
  return 0;
}

// e^x by Cephes' polynomial, within 2 ulp for finite results.
static inline vf vector_exp(vf x) {
  const float kLow = -87.3365f, kHigh = 88.3762f;
  vi below = x < splat(kLow), above = x > splat(kHigh);
  x = below ? splat(kLow) : (above ? splat(kHigh) : x);
  vf shifted = x * splat(1.44269504088896341f) + splat(12582912.0f);  // 1.5 * 2^23 rounds to integer
  vi n = (vi)shifted - (vi)splat(12582912.0f);
  vf nf = shifted - splat(12582912.0f);
  vf r = x - nf * splat(0.693359375f) + nf * splat(2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  return p * (vf)((n + 127) << 23);
}
static inline vf vector_sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + vector_exp(-x)); }

static inline vf clamp(vf x, float low, float high) {
  x = x < splat(low) ? splat(low) : x;
  return x > splat(high) ? splat(high) : x;
}

template <class F>
static inline vf each_lane(vf x, F f) {
  float lanes[L];
  std::memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < L; ++i) lanes[i] = f(lanes[i]);
  return load<vf>(lanes);
}

static inline vf gate_times_up(const fk_gating &g, vf gate, vf up) {
  switch (g.activation) {
    case FK_SILU: return gate * vector_sigmoid(gate) * up;
    case FK_GELU: return each_lane(gate, [](float v) { return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f)); }) * up;
    case FK_GELU_TANH:
      return each_lane(gate, [](float v) { return 0.5f * v * (1.0f + std::tanh(0.7978845608028654f * (v + 0.044715f * v * v * v))); }) * up;
    case FK_RELU: return (gate > splat(0.0f) ? gate : splat(0.0f)) * up;
    case FK_RELU2: {
      vf r = gate > splat(0.0f) ? gate : splat(0.0f);
      return r * r * up;
    }
    case FK_SIGMOID: return vector_sigmoid(gate) * up;
    default: {  // FK_CLAMPED_SWIGLU
      gate = gate > splat(g.limit) ? splat(g.limit) : gate;
      up = clamp(up, -g.limit, g.limit);
      return (up + splat(1.0f)) * (gate * vector_sigmoid(splat(g.alpha) * gate));
    }
  }
}

static inline vf activate(const fk_gating &g, vf x) {
  return gate_times_up(g, x, splat(1.0f));
}

// hidden[i] from one row of the first projection's product.
static void apply_gating(const fk_gating &g, const float *product, int64_t i, float *hidden) {
  for (int64_t j = 0; j < i; j += L) {
    int64_t count = std::min<int64_t>(L, i - j);
    float gate[L] = {}, up[L] = {}, result[L];
    for (int64_t c = 0; c < count; ++c) {
      gate[c] = g.is_gated && g.interleaved ? product[2 * (j + c)] : product[j + c];
      if (g.is_gated) up[c] = g.interleaved ? product[2 * (j + c) + 1] : product[i + j + c];
    }
    vf value = g.is_gated ? gate_times_up(g, load<vf>(gate), load<vf>(up)) : activate(g, load<vf>(gate));
    store(result, value);
    std::memcpy(hidden + j, result, count * sizeof(float));
  }
}

// Scratch memory of a call, reused by its groups.
struct Scratch {
  std::unique_ptr<float[]> input, product, hidden, arranged, output;
  bool allocate(int64_t rows, int64_t h, int64_t wide, int64_t i) {
    auto take = [&](std::unique_ptr<float[]> &p, int64_t n) {
      p.reset(new (std::nothrow) float[rows * n]);
      return bool(p);
    };
    return take(input, h) && take(product, wide) && take(hidden, i) && take(arranged, i) && take(output, h);
  }
};

// output[n, h] of one expert for the rows of its pairs.
static int32_t expert(const fk_matrix &first, const fk_matrix &down, const fk_gating &gating,
                      const int64_t *pair_rows, int64_t n, const void *x, int32_t x_dtype,
                      int64_t x_stride, Scratch &s, int32_t n_threads) {
  int64_t h = first.k, i = down.k, size = x_dtype == FK_FLOAT32 ? 4 : 2;
  int32_t status = with_decoder(first, [&](auto decoder) -> int32_t {
    using D = decltype(decoder);
    for (int64_t r = 0; r < n; ++r)
      arrange_input<D>((const char *)x + pair_rows[r] * x_stride * size, x_dtype, x_stride, 1, h,
                       s.input.get() + r * h);
    return multiply<D>(first, s.input.get(), n, s.product.get(), n_threads);
  });
  if (status) return status;
  for (int64_t r = 0; r < n; ++r)
    apply_gating(gating, s.product.get() + r * first.n, i, s.hidden.get() + r * i);
  return with_decoder(down, [&](auto decoder) -> int32_t {
    using D = decltype(decoder);
    arrange_input<D>(s.hidden.get(), FK_FLOAT32, i, n, i, s.arranged.get());
    return multiply<D>(down, s.arranged.get(), n, s.output.get(), n_threads);
  });
}

static int32_t experts(const fk_matrix *first, const fk_matrix *down, const fk_gating &gating,
                       const fk_pairs &pairs, const void *x, int32_t x_dtype, int64_t x_stride,
                       int64_t rows, bool is_reduced, void *out, int32_t out_dtype,
                       int64_t out_stride, int32_t n_threads) {
  int64_t h = down[0].n, most = 0;
  for (int64_t g = 0; g < pairs.n_groups; ++g) most = std::max(most, pairs.group_sizes[g]);
  Scratch scratch;
  if (!scratch.allocate(most, h, first[0].n, down[0].k)) return FK_E_MEMORY;
  std::unique_ptr<float[]> total;
  if (is_reduced) {
    total.reset(new (std::nothrow) float[rows * h]());
    if (!total) return FK_E_MEMORY;
  }
  for (int64_t g = 0, p = 0; g < pairs.n_groups; ++g) {
    int64_t n = pairs.group_sizes[g];
    int32_t status = expert(first[g], down[g], gating, pairs.rows + p, n, x, x_dtype, x_stride,
                            scratch, n_threads);
    if (status) return status;
    for (int64_t r = 0; r < n; ++r, ++p) {
      float weight = pairs.weights[p], *result = scratch.output.get() + r * h;
      if (is_reduced) {
        float *sum = total.get() + pairs.rows[p] * h;
        for (int64_t c = 0; c < h; ++c) sum[c] += result[c] * weight;
      } else {
        for (int64_t c = 0; c < h; ++c) result[c] *= weight;
        write_output(result, h, out, out_dtype, pairs.positions[p] * out_stride);
      }
    }
  }
  if (is_reduced)
    for (int64_t r = 0; r < rows; ++r) write_output(total.get() + r * h, h, out, out_dtype, r * out_stride);
  return 0;
}

}  // namespace FK_NAMESPACE
