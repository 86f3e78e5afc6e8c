// Products with 4-bit weights where bytes are multiplied (VNNI); a part of kernels_impl.h.
//
// Inputs are the same int16 numbers as in impl_integer.h, split into a signed high and an unsigned low
// byte, so sums are the same exact int32. Four units of 128 columns are a quad: 16 groups of 32 columns,
// each of which has one lane. So a group's sum is finished in one lane and scaled once for 32 columns;
// units that fill no quad have four lanes for each group.

#if defined(__AVX512VNNI__) && FK_LANES == 16

constexpr int kQuadUnits = 4;

// Brings nibbles in bytes to what is multiplied: the weight and its block's kOffset.
template <class B>
static inline FK_INLINE __m512i weight_bytes(__m512i nibbles) {
  if constexpr (std::is_same<B, Int4Block>::value) return nibbles;
  const __m128i doubled = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(doubled), nibbles);
}
template <class B>
constexpr int kNibbleOffset = std::is_same<B, Int4Block>::value ? 8 : 12;

// B is the decoder of impl_integer.h for the weights as they are stored; a tile's are decoded to bytes.
template <class B, Scaling kScaling, bool kIsTile = false>
struct NibbleEngine {
  static constexpr int kKey = 64 + std::is_same<B, Int4Block>::value;
  static constexpr int kUnit = kUnitColumns;
  static constexpr int kUnitBytes = kIsTile ? kUnitColumns : kUnitColumns / 2;
  static constexpr int kTileUnitBytes = kUnitColumns;
  static constexpr int kInputBytes = 2 * kUnitColumns + 64;  // and the sums of each lane
  static constexpr int kMaxRows = FK_INTEGER_ROWS;
  static constexpr int kMaxStreamRows = 8;
  static constexpr int kColumns = 2, kColumns1 = 4, kColumns2 = 4;
  using Scales = GroupScales<kScaling>;
  using Tile = std::conditional_t<kIsTile, void, NibbleEngine<B, kScaling, true>>;

  // Units, then one scale for each, then the number of quads.
  static int64_t packed_bytes(int64_t units) { return units * (kInputBytes + 4) + 4; }

  static void pack(const void *row, int32_t dtype, int64_t k, int64_t units, float *natural, uint8_t *to) {
    to_floats(row, dtype, 0, k, natural);
    for (int64_t j = k; j < units * kUnit; ++j) natural[j] = 0;
    int32_t n_quads = int32_t(k / (kQuadUnits * kUnit));
    float *scales = (float *)(to + units * kInputBytes);
    store(scales + units, n_quads);
    for (int64_t u = 0; u < units;) {
      int64_t count = u < n_quads * kQuadUnits ? kQuadUnits : 1;
      int16_t numbers[kQuadUnits * kUnit];
      for (int64_t i = 0; i < count; ++i)
        scales[u + i] = quantize_unit(natural + (u + i) * kUnit, dtype == FK_BFLOAT16, numbers + i * kUnit) * B::kScale;
      if (count == kQuadUnits)
        split<kQuadUnits>(numbers, to + u * kInputBytes);
      else
        split<1>(numbers, to + u * kInputBytes);
      u += count;
    }
  }

  static void decode(const uint8_t *p, int64_t units, uint8_t *to) {
    int64_t u = 0;
    auto write = [&](auto count) FK_INLINE {
      constexpr int U = decltype(count)::value;
      __m512i codes[U];
      load_codes<U>(p + u * kUnitColumns / 2, codes);
      repeat<2 * U>([&](auto v) FK_INLINE { store(to + u * kTileUnitBytes + v * 64, decode_codes<v % 2>(codes[v / 2])); });
      u += U;
    };
    while (u + kQuadUnits <= units) write(std::integral_constant<int, kQuadUnits>{});
    while (u < units) write(std::integral_constant<int, 1>{});
  }

  template <int R, int C>
  static __attribute__((noinline)) void accumulate(const Panel<C> &panel, int64_t w_unit, const uint8_t *const *x,
                                                   int64_t x_unit, int64_t count, int64_t units, vf *state) {
    vf acc[R * C];
    repeat<R * C>([&](auto i) FK_INLINE { acc[i] = state[i]; });
    const float *x_scales[R];
    for (int r = 0; r < R; ++r) x_scales[r] = (const float *)(x[r] + units * kInputBytes);
    int64_t quads_end = kQuadUnits * load<int32_t>(x_scales[0] + units), u = 0;
    auto add = [&](auto n_units) FK_INLINE {
      constexpr int U = decltype(n_units)::value;
      panel.template prefetch<U * kUnitBytes>((w_unit + u) * kUnitBytes);
      const uint8_t *in[R];
      for (int r = 0; r < R; ++r) in[r] = x[r] + (x_unit + u) * kInputBytes;
      add_units<U, R, C>(panel, (w_unit + u) * kUnitBytes, in, x_scales, x_unit + u, units, acc);
      u += U;
    };
    for (int64_t end = std::min(count, quads_end - x_unit); u < end;) add(std::integral_constant<int, kQuadUnits>{});
    while (u < count) add(std::integral_constant<int, 1>{});
    repeat<R * C>([&](auto i) FK_INLINE { state[i] = acc[i]; });
  }

 private:
  // Lane 4 b + i of a quad has group 4 i + b; a transposition in each quarter of four vectors brings it there.
  static constexpr int lane_of_group(int g) { return g % 4 * 4 + g / 4; }

  // Bytes of the input in the order of the weights' bytes. For 8 columns: even and odd low bytes, then high
  // ones, a lane of each; behind them -kOffset times the sum of each lane's numbers.
  template <int U>
  static void split(const int16_t *numbers, uint8_t *to) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15));
    int32_t *lanes = (int32_t *)to, *sums = lanes + U * kUnit / 2;
    for (int g = 0; g < 4 * U; ++g) {
      int32_t parts[16];
      store(parts, _mm512_shuffle_epi8(_mm512_loadu_si512(numbers + 32 * g), order));
      for (int t = 0; t < 4; ++t) {  // of 8 columns
        int32_t sum = 0;
        for (int i = 0; i < 8; ++i) sum += numbers[32 * g + 8 * t + i];
        int lane = U == 1 ? 4 * g + t : lane_of_group(g), vector = U == 1 ? 0 : 4 * t;
        for (int q = 0; q < 4; ++q) lanes[(vector + q) * L + lane] = parts[4 * t + q];
        sums[lane] = (U == 1 || t == 0 ? 0 : sums[lane]) - kNibbleOffset<B> * sum;
      }
    }
  }

  // The codes of one unit or, transposed, of a quad: a lane of a vector has 8 columns of one group.
  template <int U>
  static inline FK_INLINE void load_codes(const uint8_t *p, __m512i *codes) {
    repeat<U>([&](auto i) FK_INLINE { codes[i] = _mm512_loadu_si512(p + 64 * i); });
    if constexpr (U == kQuadUnits) {
      __m512i a = _mm512_unpacklo_epi32(codes[0], codes[1]), b = _mm512_unpackhi_epi32(codes[0], codes[1]);
      __m512i c = _mm512_unpacklo_epi32(codes[2], codes[3]), d = _mm512_unpackhi_epi32(codes[2], codes[3]);
      codes[0] = _mm512_unpacklo_epi64(a, c), codes[1] = _mm512_unpackhi_epi64(a, c);
      codes[2] = _mm512_unpacklo_epi64(b, d), codes[3] = _mm512_unpackhi_epi64(b, d);
    }
  }

  // Bytes of even or odd columns.
  template <int kIsOdd>
  static inline FK_INLINE __m512i decode_codes(__m512i codes) {
    if constexpr (kIsOdd) codes = _mm512_srli_epi16(codes, 4);
    return weight_bytes<B>(_mm512_and_si512(codes, _mm512_set1_epi8(15)));
  }

  // Scales of groups in their lanes.
  template <int U>
  static inline FK_INLINE vf scales_of_lanes(const float *p) {
    if constexpr (U == 1) return lane_scales(p);
    const __m512i groups = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (vf)_mm512_permutexvar_ps(groups, _mm512_loadu_ps(p));
  }

  // Adds the products of one unit or a quad: of all rows with some weight rows, or of some rows with a tile's.
  template <int U, int R, int C>
  static inline FK_INLINE void add_units(const Panel<C> &panel, int64_t offset, const uint8_t *const *in,
                                         const float *const *x_scales, int64_t u, int64_t units, vf *acc) {
    constexpr int N = R == 1 && !kIsTile ? C : std::min(C, 2), M = kIsTile ? 2 : R > 4 ? (R + 1) / 2 : R;
    repeat<C / N>([&](auto c) FK_INLINE {
      repeat<(R + M - 1) / M>([&](auto r) FK_INLINE {
        add_block<U, std::min(M, R - r * M), N, C>(panel.codes + c * N, panel.scales + c * N, offset, in + r * M,
                                                   x_scales + r * M, u, units, acc + r * M * C + c * N);
      });
    });
  }

  // acc[r * kStride + c] += the products of M input rows and N weight rows.
  template <int U, int M, int N, int kStride>
  static inline FK_INLINE void add_block(const uint8_t *const *codes, const float *const *scales, int64_t offset,
                                         const uint8_t *const *in, const float *const *x_scales, int64_t u,
                                         int64_t units, vf *acc) {
    constexpr int V = 2 * U;  // vectors of weight bytes
    __m512i loaded[N * U], high[M * N], low[M * N];
    vi sums[M];
    if constexpr (!kIsTile)
      repeat<N>([&](auto c) FK_INLINE { load_codes<U>(codes[c] + offset, loaded + c * U); });
    repeat<M>([&](auto r) FK_INLINE { sums[r] = load<vi>(in[r] + V * 128); });
    repeat<M * N>([&](auto i) FK_INLINE {
      high[i] = _mm512_setzero_si512();
      low[i] = kScaling == Scaling::kZeros ? _mm512_setzero_si512() : (__m512i)sums[i / N];
    });
    repeat<V>([&](auto v) FK_INLINE {
      __m512i w[N];
      repeat<N>([&](auto c) FK_INLINE {
        if constexpr (kIsTile)
          w[c] = _mm512_loadu_si512(codes[c] + offset + 64 * v);
        else
          w[c] = decode_codes<v % 2>(loaded[c * U + v / 2]);
      });
      repeat<M>([&](auto r) FK_INLINE {
        const uint8_t *p = in[r] + (v / 2 * 4 + v % 2) * 64;
        __m512i x_low = _mm512_loadu_si512(p), x_high = _mm512_loadu_si512(p + 128);
        repeat<N>([&](auto c) FK_INLINE {
          high[r * N + c] = _mm512_dpbusd_epi32(high[r * N + c], w[c], x_high);
          low[r * N + c] = _mm512_dpbusd_epi32(low[r * N + c], x_low, w[c]);
        });
      });
    });
    repeat<N>([&](auto c) FK_INLINE {
      vf scale = scales_of_lanes<U>(scales[c] + 4 * u);
      repeat<M>([&](auto r) FK_INLINE {
        vf value = to_float((vi)_mm512_add_epi32(_mm512_slli_epi32(high[r * N + c], 8), low[r * N + c]));
        if constexpr (kScaling == Scaling::kZeros)
          value += to_float(sums[r]) * scales_of_lanes<U>(scales[c] + 4 * (units + u));
        value *= input_scales<U>(x_scales[r] + u);
        acc[r * kStride + c] += value * scale;
      });
    });
  }

  // Scales of units in the lanes of their groups.
  template <int U>
  static inline FK_INLINE vf input_scales(const float *p) {
    if constexpr (U == 1)
      return splat(*p);
    else
      return (vf)_mm512_broadcast_f32x4(_mm_loadu_ps(p));
  }
};

#endif
