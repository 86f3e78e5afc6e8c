// Vectors, conversions and horizontal sums; a part of kernels_impl.h.

constexpr int L = FK_LANES;
typedef float vf __attribute__((vector_size(L * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(L * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(L * 4), aligned(4)));
typedef int16_t vs __attribute__((vector_size(L * 4), aligned(2)));
typedef uint16_t vus __attribute__((vector_size(L * 4), aligned(2)));

#define FK_INLINE __attribute__((always_inline))

// f(0) .. f(N - 1) with compile-time numbers: what they index stays in registers.
template <class F, int... kIndex>
static inline FK_INLINE void repeat_each(F &&f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int N, class F>
static inline FK_INLINE void repeat(F &&f) {
  repeat_each(f, std::make_integer_sequence<int, N>{});
}

template <class T>
static inline T load(const void *p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
static inline void store(void *p, T v) {
  std::memcpy(p, &v, sizeof v);
}
static inline vf splat(float s) { return s - vf{}; }  // + would have to turn -0 into 0
// What is loaded once stays in a register: the loops are bound by loads. By value, as a reference
// would claim the alignment that V has without the attributes of vf, which templates drop.
template <class V>
static inline FK_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#endif
  return v;
}
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

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

// L float16 numbers.
static inline vf load_f16(const void *p) {
#if defined(__AVX512F__) && FK_LANES == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__) && FK_LANES == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  float lanes[L];
  for (int i = 0; i < L; ++i) lanes[i] = from_f16(load<uint16_t>((const uint8_t *)p + 2 * i));
  return load<vf>(lanes);
#endif
}

static inline void floats_from_f16(const uint8_t *from, int64_t count, float *to) {
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load_f16(from + 2 * i));
  for (; i < count; ++i) to[i] = from_f16(load<uint16_t>(from + 2 * i));
}

// Numbers of a fk_dtype or fk_parameter_dtype as float32, from element `first` on.
static void to_floats(const void *p, int32_t dtype, int64_t first, int64_t count, float *to) {
  const uint8_t *from = (const uint8_t *)p;
  switch (dtype) {
    case FK_P_FLOAT32: std::memcpy(to, from + 4 * first, count * sizeof(float)); break;
    case FK_P_BFLOAT16:
      for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(load<uint16_t>(from + 2 * (first + i)));
      break;
    case FK_P_FLOAT16: floats_from_f16(from + 2 * first, count, to); break;
    case FK_P_E8M0:
      for (int64_t i = 0; i < count; ++i) to[i] = from_e8m0(from[first + i]);
      break;
    default:  // FK_P_UINT8
      for (int64_t i = 0; i < count; ++i) to[i] = float(from[first + i]);
  }
}

static void from_floats(const float *from, int64_t count, void *to, int32_t dtype) {
  uint8_t *bytes = (uint8_t *)to;
  int64_t i = 0;
  switch (dtype) {
    case FK_FLOAT32: std::memcpy(to, from, count * sizeof(float)); break;
    case FK_BFLOAT16:
      for (; i < count; ++i) store(bytes + 2 * i, to_bf16(from[i]));
      break;
    default:
#if defined(__F16C__)
      for (; i + 8 <= count; i += 8)
        store(bytes + 2 * i, _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
      for (; i < count; ++i) store(bytes + 2 * i, to_f16(from[i]));
  }
}

static inline int64_t dtype_bytes(int32_t dtype) { return dtype == FK_FLOAT32 ? 4 : 2; }

// Sums of lanes, always in the same order: halves are added until one lane is left.
static inline float horizontal_sum(vf v) {
  float lanes[L];
  std::memcpy(lanes, &v, sizeof lanes);
  for (int width = L / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

#if defined(__AVX2__)
static inline __m128 quarter_sum(vf v) {  // four lanes are left
#if FK_LANES == 16
  __m256 half = _mm256_add_ps((__m256)__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                              (__m256)__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  __m256 half = (__m256)v;
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
static inline void horizontal_sums_4(const vf *v, float *to) {
  __m128 a = quarter_sum(v[0]), b = quarter_sum(v[1]), c = quarter_sum(v[2]), d = quarter_sum(v[3]);
  __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
  __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  _mm_storeu_ps(to, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}
#else
static inline void horizontal_sums_4(const vf *v, float *to) {
  for (int i = 0; i < 4; ++i) to[i] = horizontal_sum(v[i]);
}
#endif

template <int N>
static inline void horizontal_sums(const vf *v, float *to) {
  constexpr int kWhole = N / 4 * 4, kRest = N % 4;
  for (int i = 0; i < kWhole; i += 4) horizontal_sums_4(v + i, to + i);
  if constexpr (kRest != 0) {
    vf rest[4] = {};
    float sums[4];
    for (int j = 0; j < kRest; ++j) rest[j] = v[kWhole + j];
    horizontal_sums_4(rest, sums);
    for (int j = 0; j < kRest; ++j) to[kWhole + j] = sums[j];
  }
}
