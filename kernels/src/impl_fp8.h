// Products with FP8 weights (E4M3); a part of kernels_impl.h.
//
// A weight is decoded to float32, multiplied by its scale, and used like a float32 weight. Where the
// CPU multiplies pairs of bfloat16, weights are decoded to these, exactly, and the sum over the columns
// of a scale is scaled. Codes of NaN (0x7f and 0xff) count as 480.

constexpr int kE4m3Scale = 256;  // what `decode_e4m3` leaves out

// 2 L codes as float32, too small by kE4m3Scale.
static inline FK_INLINE void decode_e4m3(const uint8_t *p, vf *w) {
#if defined(__AVX512BW__) && FK_LANES == 16
  // As a float16 with the same exponent and mantissa fields; subnormal numbers are no exception.
  __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
  __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(int16_t(0xbf80)));
  w[0] = (vf)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
  w[1] = (vf)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
#elif defined(__F16C__) && FK_LANES == 8
  __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
  __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbf80)));
  w[0] = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(half));
  w[1] = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
#else
  typedef uint8_t vb __attribute__((vector_size(L), aligned(1)));
  for (int i = 0; i < 2; ++i) {
    vu code = __builtin_convertvector(load<vb>(p + i * L), vu);
    vf small = (vf)(((code & 0x7f) << 20) | ((code & 0x80) << 24));  // by 2^-120
    w[i] = small * splat(0x1p112f);
  }
#endif
}

// Scales of one weight row times kFactor, one per unit of kColumns columns.
template <int kColumns, int kFactor>
struct BlockScales {
  const fk_matrix &m;
  int64_t units, group, groups, group_rows;

  explicit BlockScales(const fk_matrix &matrix) : m(matrix) {
    units = (m.k + kColumns - 1) / kColumns;
    group = m.group ? m.group : m.k;
    groups = (m.k + group - 1) / group;
    group_rows = std::max<int64_t>(1, m.group_rows);
  }
  static int64_t floats(const fk_matrix &m) { return (m.k + kColumns - 1) / kColumns; }
  // Of `rows` weight rows; row after row.
  void read(int64_t row, int64_t rows, float *to) const {
    for (int64_t r = 0; r < rows; ++r) read_row(row + r, to + r * units);
  }

 private:
  void read_row(int64_t row, float *to) const {
    const void *scales = m.scales;
    if (m.scales_upper && row >= m.n / 2) {
      scales = m.scales_upper;
      row -= m.n / 2;
    }
    int64_t first = row / group_rows * groups;
    if (group == kColumns) {
      to_floats(scales, m.scale_dtype, first, groups, to);
    } else {
      float value = 0;
      for (int64_t i = 0, last = -1; i < units; ++i) {
        int64_t g = i * kColumns / group;
        if (g != last) to_floats(scales, m.scale_dtype, first + g, 1, &value);
        last = g;
        to[i] = value;
      }
    }
    for (int64_t i = 0; i < units; ++i) to[i] *= kFactor;
  }
};

// Decoded and scaled weights.
template <int kColumnsOfUnit>
struct Fp8Tile {
  using Engine = FloatEngine<Float32, true>;
  static constexpr int kUnit = kColumnsOfUnit;
  static constexpr int kUnitBytes = kUnit * 4, kInputBytes = kUnit * 4;
  static constexpr int kMaxRows = Engine::kMaxRows, kColumns = Engine::kColumns;
  static constexpr int kBlocks = kUnit / Engine::kUnit;

  template <int R, int C>
  static inline FK_INLINE void accumulate(const Panel<C> &panel, int64_t w_unit, const uint8_t *const *x, int64_t x_unit,
                                          int64_t count, int64_t units, vf *state) {
    Engine::template accumulate<R, C>(panel, w_unit * kBlocks, x, x_unit * kBlocks, count * kBlocks, units, state);
  }
};

template <int kColumnsOfUnit>
struct Fp8Engine {
  static constexpr int kKey = kColumnsOfUnit == 32 ? 4 : 5;
  static constexpr int kUnit = kColumnsOfUnit;
  static constexpr int kUnitBytes = kUnit;
  static constexpr int kInputBytes = kUnit * 4;
  static constexpr int kMaxStreamRows = 4;
  static constexpr int kMaxRows = FK_FLOAT_ROWS;
  static constexpr int kColumns = FK_FLOAT_COLUMNS;
  static constexpr int kColumns1 = 4, kColumns2 = kColumns;
  static constexpr bool kScalesTile = true;  // whether `decode` needs the scales
  using Scales = BlockScales<kUnit, kE4m3Scale>;
  using Tile = Fp8Tile<kUnit>;
  static constexpr int kTileUnitBytes = kUnit * 4;
  static constexpr int kBlock = 2 * L, kBlocks = kUnit / kBlock;

  static int64_t packed_bytes(int64_t units) { return units * kInputBytes; }
  static void pack(const void *row, int32_t dtype, int64_t k, int64_t units, float *, uint8_t *to) {
    float *packed = (float *)to;
    to_floats(row, dtype, 0, k, packed);
    for (int64_t j = k; j < units * kUnit; ++j) packed[j] = 0;
  }

  static void decode(const uint8_t *p, int64_t units, uint8_t *to, const float *scales) {
    for (int64_t u = 0; u < units; ++u)
      for (int b = 0; b < kBlocks; ++b, p += kBlock, to += 8 * L) {
        vf w[2];
        decode_e4m3(p, w);
        store(to, w[0] * splat(scales[u]));
        store(to + 4 * L, w[1] * splat(scales[u]));
      }
  }

  template <int R, int C>
  static __attribute__((noinline)) void accumulate(const Panel<C> &panel, int64_t w_unit, const uint8_t *const *x,
                                                   int64_t x_unit, int64_t count, int64_t, vf *state) {
    vf acc[R * C];
    repeat<R * C>([&](auto i) FK_INLINE { acc[i] = state[i]; });
    for (int64_t u = 0; u < count; ++u) {
      vf scale[C];
      repeat<C>([&](auto c) FK_INLINE { scale[c] = splat(panel.scales[c][x_unit + u]); });
      panel.template prefetch<kUnitBytes>((w_unit + u) * kUnitBytes);
      for (int b = 0; b < kBlocks; ++b) {
        int64_t at = (w_unit + u) * kUnitBytes + b * kBlock;
        const int64_t x_at = (x_unit + u) * kInputBytes + b * 8 * L;
        vf w[2 * C];
        repeat<C>([&](auto c) FK_INLINE {
          decode_e4m3(panel.codes[c] + at, w + 2 * c);
          w[2 * c] *= scale[c];
          w[2 * c + 1] *= scale[c];
        });
        repeat<2 * R>([&](auto i) FK_INLINE {
          constexpr int r = i % R, v = i / R;
          vf in = load<vf>(x[r] + x_at + v * 4 * L);
#if defined(__x86_64__)
          asm("" : "+x"(in));  // loaded once: the loop is bound by loads
#endif
          repeat<C>([&](auto c) FK_INLINE { acc[r * C + c] += in * w[2 * c + v]; });
        });
      }
    }
    repeat<R * C>([&](auto i) FK_INLINE { state[i] = acc[i]; });
  }
};

#if defined(__AVX512BF16__) && FK_LANES == 16
// 32 codes as bfloat16: another bias of the exponent, and a table for the subnormal ones.
static inline FK_INLINE __m512bh decode_e4m3_pairs(const uint8_t *p) {
  const __m512i subnormal = _mm512_broadcast_i32x4(_mm_setr_epi16(
      0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
  __m512i magnitude = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi16(0x07f0));
  magnitude = _mm512_add_epi16(magnitude, _mm512_set1_epi16(120 << 7));
  __mmask32 is_subnormal = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x78));
  magnitude = _mm512_mask_permutexvar_epi16(magnitude, is_subnormal, code, subnormal);
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  return (__m512bh)_mm512_ternarylogic_epi32(magnitude, code, _mm512_set1_epi16(int16_t(0x8000)), kOrAnd);
}

template <bool kIsSplit, int kColumnsOfUnit, bool kIsTile = false>
struct Fp8PairsEngine {
  using Pairs = BFloat16Engine<kIsSplit>;  // whose order the inputs have
  static constexpr int kKey = 40 + 2 * int(kIsSplit) + int(kColumnsOfUnit == 32);
  static constexpr int kUnit = kColumnsOfUnit;
  static constexpr int kBlocks = kUnit / Pairs::kUnit;
  static constexpr int kUnitBytes = kIsTile ? 2 * kUnit : kUnit;
  static constexpr int kInputBytes = kBlocks * Pairs::kInputBytes;
  static constexpr int kMaxRows = 6, kMaxStreamRows = kIsTile ? kMaxRows : 4;
  static constexpr int kColumns = 2, kColumns1 = 4, kColumns2 = kColumns;
  using Scales = BlockScales<kUnit, 1>;
  using Tile = std::conditional_t<kIsTile, void, Fp8PairsEngine<kIsSplit, kUnit, true>>;
  static constexpr int kTileUnitBytes = 2 * kUnit;

  static int64_t packed_bytes(int64_t units) { return units * kInputBytes; }
  static void pack(const void *row, int32_t dtype, int64_t k, int64_t units, float *natural, uint8_t *to) {
    Pairs::pack(row, dtype, k, units * kBlocks, natural, to);
  }
  static void decode(const uint8_t *p, int64_t units, uint8_t *to) {
    for (int64_t b = 0; b < units * kBlocks; ++b) {
      __m512bh w = decode_e4m3_pairs(p + b * Pairs::kUnit);
      std::memcpy(to + b * 64, &w, 64);
    }
  }

  template <int R, int C>
  static __attribute__((noinline)) void accumulate(const Panel<C> &panel, int64_t w_unit, const uint8_t *const *x,
                                                   int64_t x_unit, int64_t count, int64_t, vf *state) {
    __m512 acc[R * C];
    repeat<R * C>([&](auto i) FK_INLINE { acc[i] = (__m512)state[i]; });
    for (int64_t u = 0; u < count; ++u) {
      panel.template prefetch<kUnitBytes>((w_unit + u) * kUnitBytes);
      __m512 sum[R * C];
      repeat<R * C>([&](auto i) FK_INLINE { sum[i] = _mm512_setzero_ps(); });
      repeat<kBlocks>([&](auto b) FK_INLINE {
        __m512bh w[C];
        repeat<C>([&](auto c) FK_INLINE {
          const uint8_t *at = panel.codes[c] + (w_unit + u) * kUnitBytes + b * (kUnitBytes / kBlocks);
          if constexpr (kIsTile)
            w[c] = load<__m512bh>(at);
          else
            w[c] = decode_e4m3_pairs(at);
        });
        repeat<R>([&](auto r) FK_INLINE {
          const uint8_t *in = x[r] + (x_unit + u) * kInputBytes + b * Pairs::kInputBytes;
          __m512bh high = load<__m512bh>(in);
          repeat<C>([&](auto c) FK_INLINE { sum[r * C + c] = _mm512_dpbf16_ps(sum[r * C + c], w[c], high); });
          if constexpr (kIsSplit) {
            __m512bh low = load<__m512bh>(in + 64);
            repeat<C>([&](auto c) FK_INLINE { sum[r * C + c] = _mm512_dpbf16_ps(sum[r * C + c], w[c], low); });
          }
        });
      });
      repeat<R * C>([&](auto i) FK_INLINE {
        __m512 scale = _mm512_set1_ps(panel.scales[i % C][x_unit + u]);
        acc[i] = _mm512_fmadd_ps(sum[i], scale, acc[i]);
      });
    }
    repeat<R * C>([&](auto i) FK_INLINE { state[i] = (vf)acc[i]; });
  }
};
#endif

// f(engine) for FP8 weights.
template <class F>
static int32_t with_fp8_engine(const fk_matrix &m, int32_t x_dtype, F &&f) {
  bool is_wide = m.group % 128 == 0;
#if defined(__AVX512BF16__) && FK_LANES == 16
  if (x_dtype == FK_BFLOAT16)
    return is_wide ? f(Fp8PairsEngine<false, 128>{}) : f(Fp8PairsEngine<false, 32>{});
  return is_wide ? f(Fp8PairsEngine<true, 128>{}) : f(Fp8PairsEngine<true, 32>{});
#else
  (void)x_dtype;
  return is_wide ? f(Fp8Engine<128>{}) : f(Fp8Engine<32>{});
#endif
}
