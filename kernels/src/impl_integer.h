// Products with integer weights; a part of kernels_impl.h.
//
// Each 128 columns of an input row become int16 numbers and a float32 scale (their largest magnitude
// is 32767): the error is below 1.6e-5 of the largest. Products and their sums over the 128 columns
// are exact int32; the sums are brought to float32, scaled and added.
//
// 128 columns are a unit, of 16 / L blocks of 8 L columns. Lane l of a block holds 8 columns of one
// 32-column sub-group, l / 4, so that each lane has one scale.

constexpr int kUnitColumns = 128;
constexpr int kBlocks = 16 / L;  // of a unit
constexpr int kBlockColumns = 8 * L;

// Sums of products of pairs of int16.
static inline vi dot_pairs(vi acc, vs a, vs b) {
#if defined(__AVX512VNNI__) && FK_LANES == 16
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__) && FK_LANES == 16
  return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && FK_LANES == 8
  return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  vi wide_a = (vi)a, wide_b = (vi)b;
  return acc + ((wide_a << 16) >> 16) * ((wide_b << 16) >> 16) + (wide_a >> 16) * (wide_b >> 16);
#endif
}

// Decoders bring a block to four vectors of int16: vector j's number i belongs to `column(j, i)`.
// With kOffset, weights are too large by that much.

struct Int8Block {
  static constexpr int kBytes = kBlockColumns;
  static constexpr int kOffset = 0;
  static constexpr float kScale = 1;
  // 16 bytes of each sub-group, then its other 16; of them even columns, then odd ones.
  static int column(int j, int i) { return i / 8 * 32 + j / 2 * 16 + i % 8 * 2 + j % 2; }
  static inline void decode(const uint8_t *p, vs *w) {
#if defined(__AVX512F__) && FK_LANES == 16
    typedef int64_t vq __attribute__((vector_size(64), aligned(8)));
    vq a = load<vq>(p), b = load<vq>(p + 64);
    vs first = (vs)__builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13);
    vs second = (vs)__builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
#elif defined(__AVX2__) && FK_LANES == 8
    __m256i a = _mm256_loadu_si256((const __m256i *)p), b = _mm256_loadu_si256((const __m256i *)(p + 32));
    vs first = (vs)_mm256_permute2x128_si256(a, b, 0x20), second = (vs)_mm256_permute2x128_si256(a, b, 0x31);
#else
    vs first = load<vs>(p), second = load<vs>(p + 16);
#endif
    w[0] = (first << 8) >> 8;
    w[1] = first >> 8;
    w[2] = (second << 8) >> 8;
    w[3] = second >> 8;
  }
};

struct Int8ZerosBlock : Int8Block {  // inputs carry their sums, which zero points multiply
  static constexpr int kOffset = 1;
};

// Nibble j of each 16 bits.
static inline int nibble_column(int j, int i) { return i / 2 * 8 + i % 2 * 4 + j; }

struct Int4Block {
  static constexpr int kBytes = kBlockColumns / 2;
  static constexpr int kOffset = 8;
  static constexpr float kScale = 1;
  static int column(int j, int i) { return nibble_column(j, i); }
  static inline void decode(const uint8_t *p, vs *w) {
    vus codes = load<vus>(p);
    w[0] = (vs)(codes & 15);
    w[1] = (vs)((codes >> 4) & 15);
    w[2] = (vs)((codes >> 8) & 15);
    w[3] = (vs)(codes >> 12);
  }
};

struct MxFp4Block {  // E2M1, doubled: sign, two exponent bits, one mantissa bit
  static constexpr int kBytes = kBlockColumns / 2;
  static constexpr float kScale = 0.5f;
  static int column(int j, int i) { return nibble_column(j, i); }
#if defined(__AVX512BW__) && FK_LANES == 16
  static constexpr int kOffset = 0;
  static inline void decode(const uint8_t *p, vs *w) {
    // The lookup ignores all but the low 5 bits; bit 4 chooses between equal halves.
    const vs values = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12,
                       0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    __m512i codes = _mm512_loadu_si512(p), table = (__m512i)values;
    w[0] = (vs)_mm512_permutexvar_epi16(codes, table);
    w[1] = (vs)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
    w[2] = (vs)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
    w[3] = (vs)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
  }
#elif defined(__AVX2__) && FK_LANES == 8
  static constexpr int kOffset = 12;
  static inline void decode(const uint8_t *p, vs *w) {
    const __m256i values = _mm256_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0, 12, 13, 14,
                                            15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i codes = _mm256_loadu_si256((const __m256i *)p);
    vus even = (vus)_mm256_shuffle_epi8(values, _mm256_and_si256(codes, mask));
    vus odd = (vus)_mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(codes, 4), mask));
    w[0] = (vs)(even & 0xff);
    w[1] = (vs)(odd & 0xff);
    w[2] = (vs)(even >> 8);
    w[3] = (vs)(odd >> 8);
  }
#else
  static constexpr int kOffset = 0;
  static inline vs value(vus code) {
    vs m = (vs)(code & 7);
    vs magnitude = m < 4 ? m : m < 6 ? m + m - 4 : 4 * m - 16;
    return (code & 8) != 0 ? -magnitude : magnitude;
  }
  static inline void decode(const uint8_t *p, vs *w) {
    vus codes = load<vus>(p);
    for (int j = 0; j < 4; ++j) w[j] = value(codes >> (4 * j));
  }
#endif
};

struct Int16Block {  // decoded before, without offset unless there are zero points
  static constexpr int kBytes = 2 * kBlockColumns;
  static constexpr int kOffset = 0;
  static constexpr float kScale = 1;
  static int column(int, int) { return 0; }
  static inline void decode(const uint8_t *p, vs *w) {
    for (int j = 0; j < 4; ++j) w[j] = load<vs>(p + j * 4 * L);
  }
};

enum class Scaling {
  kRow,     // one scale per weight row, which multiplies the finished sum
  kUnit,    // groups of whole units
  kGroups,  // groups of 32 columns or more
  kZeros,   // the same, with zero points
  kGroups16,  // groups of 16 columns, see impl_nvfp4.h
};

// Scales (and zero points) of one weight row as float32: one per unit, or one per 32 columns with
// zeros up to a whole unit; behind them the zero points.
template <Scaling kScaling>
struct GroupScales {
  const fk_matrix &m;
  int64_t units, group, groups;

  explicit GroupScales(const fk_matrix &matrix) : m(matrix) {
    units = (m.k + kUnitColumns - 1) / kUnitColumns;
    group = m.group ? m.group : m.k;
    groups = m.group ? m.k / m.group : 1;
  }
  static int64_t floats(const fk_matrix &m) {
    int64_t units = (m.k + kUnitColumns - 1) / kUnitColumns;
    switch (kScaling) {
      case Scaling::kRow: return 1;
      case Scaling::kUnit: return units;
      case Scaling::kGroups: return 4 * units;
      default: return 8 * units;
    }
  }
  // Of `rows` weight rows; row after row.
  void read(int64_t row, int64_t rows, float *to) const {
    int64_t half = m.scales_upper ? std::min(std::max(m.n / 2 - row, int64_t(0)), rows) : rows;
    if (half > 0) read_from(m.scales, row, half, to);
    if (half < rows) read_from(m.scales_upper, row + half - m.n / 2, rows - half, to + half * floats(m));
  }

 private:
  void read_from(const void *scales, int64_t row, int64_t rows, float *to) const {
    int64_t count = floats(m), columns = kScaling == Scaling::kUnit ? kUnitColumns : 32;
    if (kScaling == Scaling::kRow)
      to_floats(scales, m.scale_dtype, row, rows, to);
    else if (kScaling != Scaling::kZeros && group == columns && groups == count)  // as they lie in memory
      to_floats(scales, m.scale_dtype, row * groups, rows * groups, to);
    else
      for (int64_t r = 0; r < rows; ++r) read_groups(scales, row + r, columns, to + r * count);
  }
  void read_groups(const void *scales, int64_t row, int64_t columns, float *to) const {
    int64_t count = kScaling == Scaling::kUnit ? units : 4 * units;
    spread(scales, m.scale_dtype, row, columns, count, to);
    if (kScaling != Scaling::kZeros) return;
    spread(m.zeros, m.zero_dtype, row, columns, count, to + count);
    for (int64_t i = 0; i < count; ++i)  // multiplies -8 or -1 times the inputs' sum
      to[count + i] = m.scheme == FK_W_INT4 ? to[count + i] * (1.0f / 8) : to[count + i] - 128;
  }
  void spread(const void *p, int32_t dtype, int64_t row, int64_t columns, int64_t count, float *to) const {
    int64_t used = std::min(count, (m.k + columns - 1) / columns);
    if (group == columns) {
      to_floats(p, dtype, row * groups, used, to);
    } else if (group % columns == 0) {  // read at the end of `to`, then repeated from its begin
      int64_t times = group / columns, n = std::min(groups, (used + times - 1) / times);
      float *values = to + count - n;
      to_floats(p, dtype, row * groups, n, values);
      for (int64_t g = 0, i = 0; g < n; ++g) {
        float value = values[g];
        int64_t end = g + 1 < n ? i + times : used;
        for (; i < end; ++i) to[i] = value;
      }
    } else {
      float value = 0;
      for (int64_t i = 0, last = -1; i < used; ++i) {
        int64_t g = std::min(i * columns / group, groups - 1);
        if (g != last) to_floats(p, dtype, row * groups + g, 1, &value);
        last = g;
        to[i] = value;
      }
    }
    for (int64_t i = used; i < count; ++i) to[i] = 0;
  }
};

// Scales of sub-groups in the lanes of a block.
static inline vf lane_scales(const float *p) {
#if defined(__AVX512F__) && FK_LANES == 16
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (vf)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_loadu_ps(p)));
#elif defined(__AVX2__) && FK_LANES == 8
  const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return (vf)_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_broadcast_sd((const double *)p)), lanes);
#else
  return splat(p[0]);
#endif
}

// The same of groups of 16 columns.
static inline vf lane_scales_of_16(const float *p) {
#if defined(__AVX512F__) && FK_LANES == 16
  const __m512i lanes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return (vf)_mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
#elif defined(__AVX2__) && FK_LANES == 8
  const __m256i lanes = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return (vf)_mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), lanes);
#else
  vf scales;
  for (int l = 0; l < L; ++l) scales[l] = p[l / 2];
  return scales;
#endif
}

// int16 numbers of a unit; returns the scale, which is NaN if a number is not finite. A scale that is a power
// of two leaves bfloat16 numbers exact that are not below a 128th of the largest.
static float quantize_unit(const float *x, bool is_power_of_two, int16_t *numbers) {
  uint32_t largest = 0;
  for (int i = 0; i < kUnitColumns; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, 4);
  if (largest >= 0x7f800000u) {
    std::memset(numbers, 0, kUnitColumns * sizeof(int16_t));
    return NAN;
  }
  float scale = magnitude >= 1e-30f ? magnitude / 32767 : 0;
  if (is_power_of_two && scale > 0) {
    uint32_t bits = (largest & 0x7f800000u) - (14u << 23);
    std::memcpy(&scale, &bits, 4);
  }
  float inverse = scale > 0 ? 1 / scale : 0;
  for (int i = 0; i < kUnitColumns; ++i) {
    float shifted = x[i] * inverse + 12582912.0f;  // 1.5 * 2^23 rounds to integer
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    numbers[i] = int16_t(bits);
  }
  return scale;
}

// D decodes; B is the decoder of the weights as they are stored, whose order the inputs have.
template <class D, class B, Scaling kScaling>
struct IntegerEngine {
  static constexpr bool kIsTile = std::is_same<D, Int16Block>::value;
  static constexpr bool kHasSums = B::kOffset != 0;  // whether inputs carry their sums
  static constexpr bool kStartsAtSums = D::kOffset != 0 && kScaling != Scaling::kZeros;
  static constexpr bool kIsPerUnit = kScaling == Scaling::kRow || kScaling == Scaling::kUnit;
  static constexpr int kKey = 8 + 16 * int(kIsPerUnit) + (std::is_same<B, Int8Block>::value ? 0 : std::is_same<B, Int4Block>::value ? 1 : std::is_same<B, Int8ZerosBlock>::value ? 3 : 2);
  static constexpr int kUnit = kUnitColumns;
  static constexpr int kUnitBytes = kBlocks * D::kBytes;
  static constexpr int kInputBytes = 2 * kUnitColumns + (kHasSums ? 64 : 0);
  static constexpr int kMaxRows = FK_INTEGER_ROWS;
  static constexpr int kMaxStreamRows = kIsTile ? kMaxRows : 4;
  static constexpr int kColumns = FK_INTEGER_COLUMNS, kColumns1 = 4, kColumns2 = L == 16 ? 4 : kColumns;
  template <int R>
  static constexpr bool keeps_inputs() { return L == 16 && R <= 2 && !kIsTile; }  // AVX-512 has 32 registers
  using Scales = GroupScales<kScaling>;
  using Tile = std::conditional_t<kIsTile, void, IntegerEngine<Int16Block, B, kScaling>>;
  static constexpr int kTileUnitBytes = 2 * kUnitColumns;

  // Units, then one scale for each.
  static int64_t packed_bytes(int64_t units) { return units * (kInputBytes + 4); }

  static void pack(const void *row, int32_t dtype, int64_t k, int64_t units, float *natural, uint8_t *to) {
    to_floats(row, dtype, 0, k, natural);
    for (int64_t j = k; j < units * kUnit; ++j) natural[j] = 0;
    float *scales = (float *)(to + units * kInputBytes);
    for (int64_t u = 0; u < units; ++u, natural += kUnit, to += kInputBytes) {
      int16_t numbers[kUnit];
      scales[u] = quantize_unit(natural, dtype == FK_BFLOAT16, numbers) * B::kScale;
      int16_t *packed = (int16_t *)to;
      for (int b = 0; b < kBlocks; ++b)
        for (int j = 0; j < 4; ++j)
          for (int i = 0; i < 2 * L; ++i)
            packed[(b * 4 + j) * 2 * L + i] = numbers[b * kBlockColumns + B::column(j, i)];
      if (kHasSums) write_sums(packed, (int32_t *)(to + 2 * kUnit));
    }
  }

  // -kOffset times the sum of each lane's inputs, by block or for the whole unit.
  static void write_sums(const int16_t *packed, int32_t *sums) {
    for (int b = 0; b < kBlocks; ++b)
      for (int l = 0; l < L; ++l) {
        int32_t sum = 0;
        for (int j = 0; j < 4; ++j) {
          const int16_t *pair = packed + (b * 4 + j) * 2 * L + 2 * l;
          sum += pair[0] + pair[1];
        }
        if (kIsPerUnit && b > 0)
          sums[l] -= B::kOffset * sum;
        else
          sums[b * L + l] = -B::kOffset * sum;
      }
  }

  static void decode(const uint8_t *p, int64_t units, uint8_t *to) {
    for (int64_t b = 0; b < units * kBlocks; ++b) {
      vs w[4];
      D::decode(p + b * D::kBytes, w);
      for (int j = 0; j < 4; ++j)
        store(to + (b * 4 + j) * 4 * L, kStartsAtSums ? vs(w[j] - int16_t(D::kOffset)) : w[j]);
    }
  }

  template <int R, int C>
  static __attribute__((noinline)) void accumulate(const Panel<C> &panel, int64_t w_unit, const uint8_t *const *x, int64_t x_unit,
                         int64_t count, int64_t units, vf *state) {
    vf acc[R * C];
    repeat<R * C>([&](auto i) FK_INLINE { acc[i] = state[i]; });
    const float *x_scales[R];
    for (int r = 0; r < R; ++r) x_scales[r] = (const float *)(x[r] + units * kInputBytes);
    for (int64_t u = 0; u < count; ++u) {
      panel.template prefetch<kUnitBytes>((w_unit + u) * kUnitBytes);
      const uint8_t *in[R];
      for (int r = 0; r < R; ++r) in[r] = x[r] + (x_unit + u) * kInputBytes;
      if constexpr (R == 1 && !keeps_inputs<R>())  // one weight row after another: they need few registers
        repeat<C>([&](auto c) FK_INLINE {
          unit<1, 1>(panel.codes + c, (w_unit + u) * kUnitBytes, panel.scales + c, in, x_scales, x_unit + u, units,
                     acc + c);
        });
      else
        unit<R, C>(panel.codes, (w_unit + u) * kUnitBytes, panel.scales, in, x_scales, x_unit + u, units, acc);
    }
    repeat<R * C>([&](auto i) FK_INLINE { state[i] = acc[i]; });
  }

  // Adds a unit's products. Input rows that are kept in registers are loaded once for all weight rows.
  template <int R, int C>
  static inline FK_INLINE void unit(const uint8_t *const *codes, int64_t offset,
                                                         const float *const *scales, const uint8_t *const *in,
                                                         const float *const *x_scales, int64_t u, int64_t units,
                                                         vf *acc) {
    constexpr int kSummed = kIsPerUnit ? kBlocks : 1, V = 4 * kSummed;  // blocks of one scale, and their vectors
    repeat<kBlocks / kSummed>([&](auto b) FK_INLINE {
      vs w[C * V], kept[R * V];
      vi kept_sums[R];
      vf scale[C], zero[C];
      auto load_input = [&](auto r, auto v) FK_INLINE { return load<vs>(in[r] + (b * V + v) * 4 * L); };
      auto load_sums = [&](auto r) FK_INLINE { return load<vi>(in[r] + 2 * kUnit + b * 4 * L); };
      if constexpr (keeps_inputs<R>())
        repeat<R>([&](auto r) FK_INLINE {
          repeat<V>([&](auto v) FK_INLINE { kept[r * V + v] = in_register(load_input(r, v)); });
          if constexpr (kHasSums) kept_sums[r] = in_register(load_sums(r));
        });
      auto read_weights = [&](auto c) FK_INLINE {
        repeat<kSummed>([&](auto i) FK_INLINE {
          D::decode(codes[c] + offset + (b * kSummed + i) * D::kBytes, w + V * c + 4 * i);
        });
        if constexpr (kScaling == Scaling::kUnit) scale[c] = splat(scales[c][u]);
        if constexpr (kIsPerUnit) return;
        const float *at = scales[c] + 4 * u + b * (L / 4);
        if constexpr (kScaling == Scaling::kGroups16)
          scale[c] = lane_scales_of_16(scales[c] + 8 * u + b * (L / 2));
        else
          scale[c] = lane_scales(at);
        if constexpr (kScaling == Scaling::kZeros) zero[c] = lane_scales(at + 4 * units);
      };
      auto add = [&](auto r, auto c) FK_INLINE {
        auto sums = [&]() FK_INLINE {
          if constexpr (keeps_inputs<R>())
            return kept_sums[r];
          else
            return load_sums(r);
        };
        vi sum{};
        if constexpr (kStartsAtSums) sum = sums();
        repeat<V>([&](auto v) FK_INLINE {
          if constexpr (keeps_inputs<R>())
            sum = dot_pairs(sum, w[c * V + v], kept[r * V + v]);
          else
            sum = dot_pairs(sum, w[c * V + v], load_input(r, v));
        });
        vf value = to_float(sum);
        if constexpr (kScaling == Scaling::kZeros) value += to_float(sums()) * zero[c];
        value *= splat(x_scales[r][u]);
        if constexpr (kScaling == Scaling::kRow)
          acc[r * C + c] += value;
        else
          acc[r * C + c] += value * scale[c];
      };
      if constexpr (keeps_inputs<R>()) {
        repeat<C>([&](auto c) FK_INLINE {
          read_weights(c);
          repeat<R>([&](auto r) FK_INLINE { add(r, c); });
        });
      } else {
        repeat<C>([&](auto c) FK_INLINE { read_weights(c); });
        repeat<R * C>([&](auto i) FK_INLINE {
          add(std::integral_constant<int, i / C>{}, std::integral_constant<int, i % C>{});
        });
      }
    });
  }
};
