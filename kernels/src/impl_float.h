// Products with float32 arithmetic: weights are brought to float32 and multiplied in; and, where
// the CPU has them, products of bfloat16 pairs. A part of kernels_impl.h.
//
// An engine says how weights and inputs are multiplied. Its members:
//   kUnit          columns of one step; inputs are padded with zeros to whole units
//   kUnitBytes     of the weights of a unit, as they are streamed
//   kInputBytes    of one input row's part of a unit
//   kMaxStreamRows input rows up to which weights are used as they lie in memory
//   kMaxRows       input rows that are multiplied at once, at most, and kColumns weight rows by them
//   kColumns1      weight rows that are multiplied at once by a single input row, kColumns2 by two
//   pack           brings an input row into the order in which its numbers are used
//   Scales         what the scales of some weight rows become before they are used
//   accumulate     state[r][c] += x_r . w_c over some units
//   Tile, decode   the engine of decoded weights, and what decodes them; Tile is void if it is not needed

struct Float32 {
  static constexpr int kBlock = 2 * L;
  static constexpr int kBytes = 8 * L;
  static constexpr bool kPairs = false;  // whether even columns come first, then odd ones
  static inline void decode(const uint8_t *p, vf *w) {
    w[0] = load<vf>(p);
    w[1] = load<vf>(p + 4 * L);
  }
};

struct BFloat16 {  // a shift and a mask decode two vectors
  static constexpr int kBlock = 2 * L;
  static constexpr int kBytes = 4 * L;
  static constexpr bool kPairs = true;
  static inline void decode(const uint8_t *p, vf *w) {
    vu bits = load<vu>(p);
    w[0] = (vf)(bits << 16);
    w[1] = (vf)(bits & 0xffff0000u);
  }
};

struct Float16 {
  static constexpr int kBlock = 2 * L;
  static constexpr int kBytes = 4 * L;
  static constexpr bool kPairs = false;
  static inline void decode(const uint8_t *p, vf *w) {
    w[0] = load_f16(p);
    w[1] = load_f16(p + 2 * L);
  }
};

struct NoScales {  // of engines without scales
  explicit NoScales(const fk_matrix &) {}
  static int64_t floats(const fk_matrix &) { return 0; }
  void read(int64_t, int64_t, float *) const {}
};

template <class D, bool kIsTile = false>
struct FloatEngine {
  static constexpr int kKey = D::kPairs ? 1 : 0;
  static constexpr int kUnit = D::kBlock;
  static constexpr int kUnitBytes = D::kBytes;
  static constexpr int kInputBytes = kUnit * 4;
  static constexpr int kMaxStreamRows = kIsTile ? FK_FLOAT_ROWS : 4;
  static constexpr int kMaxRows = FK_FLOAT_ROWS;
  static constexpr int kColumns = FK_FLOAT_COLUMNS;
  static constexpr int kColumns1 = 4, kColumns2 = kColumns;
  using Scales = NoScales;
  using Tile = std::conditional_t<kIsTile, void, FloatEngine<Float32, true>>;
  static constexpr int kTileUnitBytes = kUnit * 4;

  static int64_t packed_bytes(int64_t units) { return units * kInputBytes; }
  static void pack(const void *row, int32_t dtype, int64_t k, int64_t units, float *natural, uint8_t *to) {
    float *packed = (float *)to;
    float *target = D::kPairs ? natural : packed;
    to_floats(row, dtype, 0, k, target);
    for (int64_t j = k; j < units * kUnit; ++j) target[j] = 0;
    if (!D::kPairs) return;
    for (int64_t u = 0; u < units; ++u, natural += kUnit, packed += kUnit)
      for (int i = 0; i < L; ++i) {
        packed[i] = natural[2 * i];
        packed[L + i] = natural[2 * i + 1];
      }
  }

  static void decode(const uint8_t *p, int64_t units, uint8_t *to) {
    for (int64_t u = 0; u < units; ++u) {
      vf w[2];
      D::decode(p + u * kUnitBytes, w);
      store(to + u * kTileUnitBytes, w[0]);
      store(to + u * kTileUnitBytes + 4 * L, w[1]);
    }
  }

  template <int R, int C>
  static __attribute__((noinline)) void accumulate(const Panel<C> &panel, int64_t w_unit, const uint8_t *const *x, int64_t x_unit,
                         int64_t count, int64_t, vf *state) {
    vf acc[R * C];
    repeat<R * C>([&](auto i) FK_INLINE { acc[i] = state[i]; });
    for (int64_t u = 0; u < count; ++u) {
      panel.template prefetch<kUnitBytes>((w_unit + u) * kUnitBytes);
      vf w[2 * C];
      repeat<C>([&](auto c) FK_INLINE { D::decode(panel.codes[c] + (w_unit + u) * kUnitBytes, w + 2 * c); });
      repeat<2 * R>([&](auto i) FK_INLINE {
        constexpr int r = i % R, v = i / R;
        vf in = in_register(load<vf>(x[r] + (x_unit + u) * kInputBytes + v * 4 * L));
        repeat<C>([&](auto c) FK_INLINE { acc[r * C + c] += in * w[2 * c + v]; });
      });
    }
    repeat<R * C>([&](auto i) FK_INLINE { state[i] = acc[i]; });
  }
};

#if defined(__AVX512BF16__) && FK_LANES == 16
// Pairs of bfloat16, each product added to a float32 lane. Inputs that are no bfloat16 are split
// into the sum of two, which keeps 16 bits of their mantissa.
template <bool kIsSplit>
struct BFloat16Engine {
  static constexpr int kKey = kIsSplit ? 3 : 2;
  static constexpr int kUnit = 32;
  static constexpr int kUnitBytes = 64;
  static constexpr int kInputBytes = kIsSplit ? 128 : 64;
  static constexpr int kMaxRows = 6, kMaxStreamRows = 6;
  static constexpr int kColumns = 4, kColumns1 = 4, kColumns2 = 4;
  using Scales = NoScales;
  using Tile = void;
  static constexpr int kTileUnitBytes = 0;
  static void decode(const uint8_t *, int64_t, uint8_t *) {}

  static int64_t packed_bytes(int64_t units) { return units * kInputBytes; }
  static void pack(const void *row, int32_t dtype, int64_t k, int64_t units, float *natural, uint8_t *to) {
    if (!kIsSplit) {  // bfloat16 already
      std::memcpy(to, row, 2 * k);
      std::memset(to + 2 * k, 0, 2 * (units * kUnit - k));
      return;
    }
    to_floats(row, dtype, 0, k, natural);
    for (int64_t j = k; j < units * kUnit; ++j) natural[j] = 0;
    for (int64_t u = 0; u < units; ++u, to += kInputBytes) {
      __m512 a = _mm512_loadu_ps(natural + u * kUnit), b = _mm512_loadu_ps(natural + u * kUnit + 16);
      __m512bh high = _mm512_cvtne2ps_pbh(b, a);
      __m512i bits = (__m512i)high;
      __m512 high_a = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits)), 16));
      __m512 high_b = _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1)), 16));
      __m512bh low = _mm512_cvtne2ps_pbh(_mm512_sub_ps(b, high_b), _mm512_sub_ps(a, high_a));
      std::memcpy(to, &high, 64);
      std::memcpy(to + 64, &low, 64);
    }
  }

  template <int R, int C>
  static __attribute__((noinline)) void accumulate(const Panel<C> &panel, int64_t w_unit, const uint8_t *const *x, int64_t x_unit,
                         int64_t count, int64_t, vf *state) {
    __m512 acc[R * C];
    repeat<R * C>([&](auto i) FK_INLINE { acc[i] = (__m512)state[i]; });
    for (int64_t u = 0; u < count; ++u) {
      panel.template prefetch<kUnitBytes>((w_unit + u) * kUnitBytes);
      __m512bh w[C];
      repeat<C>([&](auto c) FK_INLINE { w[c] = load<__m512bh>(panel.codes[c] + (w_unit + u) * kUnitBytes); });
      repeat<R>([&](auto r) FK_INLINE {
        const uint8_t *in = x[r] + (x_unit + u) * kInputBytes;
        __m512bh high = load<__m512bh>(in);
        repeat<C>([&](auto c) FK_INLINE { acc[r * C + c] = _mm512_dpbf16_ps(acc[r * C + c], w[c], high); });
        if constexpr (kIsSplit) {
          __m512bh low = load<__m512bh>(in + 64);
          repeat<C>([&](auto c) FK_INLINE { acc[r * C + c] = _mm512_dpbf16_ps(acc[r * C + c], w[c], low); });
        }
      });
    }
    repeat<R * C>([&](auto i) FK_INLINE { state[i] = (vf)acc[i]; });
  }
};
#endif
