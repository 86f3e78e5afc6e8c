// Products of one matrix with packed input rows; a part of kernels_impl.h.
//
// Every output is one vector of sums over k, in ascending order, and one horizontal sum at the end.
// How many rows or columns are computed at once (the last columns one by one), and whether weights are decoded in registers or
// into a tile before, changes no bit of it.

constexpr int64_t kAheadBytes = 16384;      // that are prefetched before they are needed, of some weight rows
constexpr int64_t kRowAheadBytes = 2048;    // the same of one long row
constexpr int64_t kTileRows = 32;           // weight rows that stay in the cache for many input rows
constexpr int64_t kInputBlockBytes = 4096;  // of each input row that are used at once by all rows of a tile

// Memory of one thread, kept between calls.
class Workspace {
 public:
  ~Workspace() { std::free(memory_); }
  // `bytes` at a cache line's boundary; NULL if there is no memory.
  uint8_t *take(int64_t bytes) {
    if (bytes <= size_) return memory_;
    std::free(memory_);
    size_ = (bytes + 4095) / 4096 * 4096;
    memory_ = (uint8_t *)std::aligned_alloc(4096, size_);
    if (!memory_) size_ = 0;
    return memory_;
  }

 private:
  uint8_t *memory_ = nullptr;
  int64_t size_ = 0;
};
static thread_local Workspace workspace;

static inline int64_t aligned(int64_t bytes) { return (bytes + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes; }

// Bytes from one packed or decoded row to the next: no multiple of 4096, which would put all rows
// into the same sets of the first-level cache.
static inline int64_t row_pitch(int64_t bytes) { return aligned(bytes) + kCacheLineBytes; }

template <int R, int kMin, class F>
static inline void with_count(int64_t count, F &&f) {
  if (count == R)
    f(std::integral_constant<int, R>{});
  else if constexpr (R > kMin)
    with_count<R - 1, kMin>(count, f);
}

template <class E, class = void>
struct NeedsScalesToDecode : std::false_type {};
template <class E>
struct NeedsScalesToDecode<E, std::void_t<decltype(E::kScalesTile)>> : std::true_type {};

// Decodes units of one weight row into a tile; `scales` are those of the first unit and the next.
template <class E>
static inline void decode(const uint8_t *p, int64_t units, uint8_t *to, const float *scales) {
  if constexpr (NeedsScalesToDecode<E>::value)
    E::decode(p, units, to, scales);
  else
    E::decode(p, units, to);
}

// out[r * out_stride + c - begin] = x_r . w_c for begin <= c < end.
template <class E>
class Product {
 public:
  explicit Product(const fk_matrix &m) : m_(m), scales_(m) {
    units_ = (m.k + E::kUnit - 1) / E::kUnit;
    whole_ = m.k / E::kUnit;
    row_bytes_ = m.k * E::kUnitBytes / E::kUnit;
    tail_bytes_ = row_bytes_ - whole_ * E::kUnitBytes;
  }

  bool multiply(int64_t begin, int64_t end, const uint8_t *const *x, int64_t rows, float *out,
                int64_t out_stride) const {
    out -= begin;
    if (rows > E::kMaxStreamRows) return multiply_blocks(begin, end, x, rows, out, out_stride);
    uint8_t *memory = workspace.take(stream_bytes());
    if (!memory) return false;
    with_count<E::kMaxStreamRows, 1>(rows, [&](auto count) {
      constexpr int R = decltype(count)::value, C = R == 1 ? E::kColumns1 : R == 2 ? E::kColumns2 : E::kColumns;
      int64_t c = begin;
      for (; c + C <= end; c += C) stream<R, C>(c, x, out + c, out_stride, memory);
      for (; c < end; ++c)
        for (int r = 0; r < R; ++r) stream<1, 1>(c, x + r, out + r * out_stride + c, out_stride, memory);
    });
    return true;
  }

 private:
  static constexpr int kMaxColumns = std::max({E::kColumns, E::kColumns1, E::kColumns2});
  int64_t scale_floats() const { return E::Scales::floats(m_); }
  int64_t stream_bytes() const { return kMaxColumns * (scale_floats() * 4 + E::kUnitBytes); }
  const uint8_t *row(int64_t c) const {
    if (m_.codes_upper && c >= m_.n / 2) return (const uint8_t *)m_.codes_upper + (c - m_.n / 2) * row_bytes_;
    return (const uint8_t *)m_.codes + c * row_bytes_;
  }

  void copy_tail(int64_t c, uint8_t *to) const {
    std::memcpy(to, row(c) + whole_ * E::kUnitBytes, tail_bytes_);
    std::memset(to + tail_bytes_, 0, E::kUnitBytes - tail_bytes_);
  }

  template <int R, int C>
  void stream(int64_t c0, const uint8_t *const *x, float *out, int64_t out_stride, uint8_t *memory) const {
    Panel<C> panel, tails;
    scales_.read(c0, C, (float *)memory);
    for (int c = 0; c < C; ++c) {
      const float *scales = (float *)memory + c * scale_floats();
      panel.codes[c] = row(c0 + c);
      panel.scales[c] = tails.scales[c] = scales;
    }
    if (C * row_bytes_ >= kAheadBytes) {
      panel.ahead = kRowAheadBytes;
      panel.row_bytes = row_bytes_;
      panel.skip = (C - 1) * row_bytes_;
    } else {
      panel.ahead = kAheadBytes / (C * row_bytes_) * C * row_bytes_;
      panel.row_bytes = INT64_MAX;
    }
    alignas(kCacheLineBytes) vf state[R * C] = {};
    E::template accumulate<R, C>(panel, 0, x, 0, whole_, units_, state);
    if (tail_bytes_) {
      uint8_t *tail = memory + kMaxColumns * scale_floats() * 4;
      for (int c = 0; c < C; ++c) {
        copy_tail(c0 + c, tail + c * E::kUnitBytes);
        tails.codes[c] = tail + c * E::kUnitBytes;
      }
      E::template accumulate<R, C>(tails, 0, x, whole_, 1, units_, state);
    }
    finish<R, C>(state, panel.scales, out, out_stride);
  }

  template <int R, int C>
  static void finish(const vf *state, const float *const *scales, float *out, int64_t out_stride) {
    float sums[R * C];
    horizontal_sums<R * C>(state, sums);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        out[r * out_stride + c] = has_row_scale() ? sums[r * C + c] * scales[c][0] : sums[r * C + c];
  }
  static constexpr bool has_row_scale() { return std::is_same<typename E::Scales, GroupScales<Scaling::kRow>>::value; }

  // Some weight rows that are used for all input rows.
  struct Tile {
    const uint8_t *codes[kTileRows], *tails[kTileRows];
    const float *scales[kTileRows];
    int64_t count;
  };

  bool multiply_blocks(int64_t begin, int64_t end, const uint8_t *const *x, int64_t rows, float *out,
                       int64_t out_stride) const {
    int64_t pitch = kIsDecoded ? row_pitch(units_ * E::kTileUnitBytes) : 0;
    int64_t scales_bytes = scale_floats() * 4;
    uint8_t *memory = workspace.take(kTileRows * (pitch + scales_bytes + E::kUnitBytes));
    if (!memory) return false;
    for (int64_t c0 = begin; c0 < end; c0 += kTileRows) {
      Tile tile;
      tile.count = std::min(kTileRows, end - c0);
      scales_.read(c0, tile.count, (float *)(memory + kTileRows * pitch));
      for (int64_t c = 0; c < tile.count; ++c) {
        const float *scales = (float *)(memory + kTileRows * pitch + c * scales_bytes);
        uint8_t *tail = memory + kTileRows * (pitch + scales_bytes) + c * E::kUnitBytes;
        tile.scales[c] = scales;
        if (tail_bytes_) copy_tail(c0 + c, tail);
        tile.codes[c] = row(c0 + c);
        tile.tails[c] = tail;
        if (!kIsDecoded) continue;
        uint8_t *decoded = memory + c * pitch;
        for (int64_t b = 0; b < row_bytes_; b += kCacheLineBytes)
          __builtin_prefetch(tile.codes[c] + kTileRows * row_bytes_ + b, 0, 2);
        decode<E>(tile.codes[c], whole_, decoded, scales);
        if (tail_bytes_) decode<E>(tail, 1, decoded + whole_ * E::kTileUnitBytes, scales + whole_);
        tile.codes[c] = decoded;
      }
      multiply_tile(tile, x, rows, out + c0, out_stride);
    }
    return true;
  }

  static constexpr bool kIsDecoded = !std::is_void<typename E::Tile>::value;
  using T = std::conditional_t<kIsDecoded, typename E::Tile, E>;

  void multiply_tile(const Tile &tile, const uint8_t *const *x, int64_t rows, float *out,
                     int64_t out_stride) const {
    int64_t n = (rows + T::kMaxRows - 1) / T::kMaxRows;
    for (int64_t i = 0, r = 0; i < n; ++i) {
      int64_t count = (rows - r) / (n - i);
      with_count<T::kMaxRows, (T::kMaxRows + 1) / 2>(count, [&](auto constant) {
        multiply_rows<decltype(constant)::value>(tile, x + r, i == 0, out + r * out_stride, out_stride);
      });
      r += count;
    }
  }

  template <int R>
  void multiply_rows(const Tile &tile, const uint8_t *const *x, bool is_first, float *out,
                     int64_t out_stride) const {
    constexpr int C = T::kColumns;
    alignas(kCacheLineBytes) vf state[kTileRows * R] = {};
    int64_t units = kIsDecoded ? units_ : whole_;
    int64_t step = std::max<int64_t>(1, kInputBlockBytes / T::kInputBytes);
    for (int64_t u = 0; u < units; u += step) {
      int64_t c = 0, n = std::min(step, units - u);
      for (; c + C <= tile.count; c += C)
        add_units<R, C>(tile, c, tile.codes, u, x, u, n, is_first, state + c * R);
      for (; c < tile.count; ++c)
        for (int r = 0; r < R; ++r)
          add_units<1, 1>(tile, c, tile.codes, u, x + r, u, n, is_first && r == 0, state + c * R + r);
    }
    int64_t c = 0;
    bool has_tail = !kIsDecoded && tail_bytes_;
    for (; c + C <= tile.count; c += C) {
      if (has_tail) add_units<R, C>(tile, c, tile.tails, 0, x, whole_, 1, false, state + c * R);
      finish<R, C>(state + c * R, tile.scales + c, out + c, out_stride);
    }
    for (; c < tile.count; ++c)
      for (int r = 0; r < R; ++r) {
        if (has_tail) add_units<1, 1>(tile, c, tile.tails, 0, x + r, whole_, 1, false, state + c * R + r);
        finish<1, 1>(state + c * R + r, tile.scales + c, out + r * out_stride + c, out_stride);
      }
  }

  template <int R, int C>
  void add_units(const Tile &tile, int64_t c0, const uint8_t *const *codes, int64_t w_unit,
                 const uint8_t *const *x, int64_t x_unit, int64_t count, bool is_first, vf *state) const {
    Panel<C> panel;
    for (int c = 0; c < C; ++c) {
      panel.codes[c] = codes[c0 + c];
      panel.scales[c] = tile.scales[c0 + c];
    }
    if (is_first && !kIsDecoded) {
      panel.ahead = kTileRows * row_bytes_;
      panel.row_bytes = INT64_MAX;
    }
    T::template accumulate<R, C>(panel, w_unit, x, x_unit, count, units_, state);
  }

  fk_matrix m_;
  typename E::Scales scales_;
  int64_t units_, whole_, row_bytes_, tail_bytes_;
};

// f(engine) for a matrix and the type of its inputs.
template <class F>
static int32_t with_engine(const fk_matrix &m, int32_t x_dtype, F &&f) {
  bool is_per_row = m.group == 0 || m.group == m.k;
  switch (m.scheme) {
    case FK_W_FLOAT32: return f(FloatEngine<Float32>{});
    case FK_W_FLOAT16: return f(FloatEngine<Float16>{});
    case FK_W_BFLOAT16:
#if defined(__AVX512BF16__) && FK_LANES == 16
      return x_dtype == FK_BFLOAT16 ? f(BFloat16Engine<false>{}) : f(BFloat16Engine<true>{});
#else
      (void)x_dtype;
      return f(FloatEngine<BFloat16>{});
#endif
    case FK_W_INT8:
      if (m.zeros) return f(IntegerEngine<Int8ZerosBlock, Int8ZerosBlock, Scaling::kZeros>{});
      if (is_per_row) return f(IntegerEngine<Int8Block, Int8Block, Scaling::kRow>{});
      if (m.group % kUnitColumns == 0) return f(IntegerEngine<Int8Block, Int8Block, Scaling::kUnit>{});
      return f(IntegerEngine<Int8Block, Int8Block, Scaling::kGroups>{});
    case FK_W_INT4:
#if defined(__AVX512VNNI__) && FK_LANES == 16
      if (m.zeros) return f(NibbleEngine<Int4Block, Scaling::kZeros>{});
      return f(NibbleEngine<Int4Block, Scaling::kGroups>{});
#else
      if (m.zeros) return f(IntegerEngine<Int4Block, Int4Block, Scaling::kZeros>{});
      if (is_per_row || m.group % kUnitColumns == 0) return f(IntegerEngine<Int4Block, Int4Block, Scaling::kUnit>{});
      return f(IntegerEngine<Int4Block, Int4Block, Scaling::kGroups>{});
#endif
    case FK_W_FP8: return with_fp8_engine(m, x_dtype, f);
    case FK_W_MXFP4:
#if defined(__AVX512VNNI__) && FK_LANES == 16
      return f(NibbleEngine<MxFp4Block, Scaling::kGroups>{});
#else
      return f(IntegerEngine<MxFp4Block, MxFp4Block, Scaling::kGroups>{});
#endif
    case FK_W_NVFP4: return f(IntegerEngine<MxFp4Block, MxFp4Block, Scaling::kGroups16>{});
    default: return FK_E_ARGUMENT;
  }
}
