// The two calls: products of packed inputs in parallel; a part of kernels_impl.h.

constexpr int64_t kMinChunkBytes = 64 << 10;  // of weights that a thread takes at once
constexpr int64_t kPairsPerWave = 2048;       // of groups that are computed together

using Floats = std::unique_ptr<float[]>;

static bool allocate(Floats &to, int64_t count) {
  to.reset(new (std::nothrow) float[count]);
  return bool(to);
}

// Input rows in the order of an engine.
class PackedRows {
 public:
  // Room for `rows` rows of k numbers.
  template <class E>
  bool reserve(int64_t rows, int64_t k) {
    k_ = k;
    units_ = (k + E::kUnit - 1) / E::kUnit;
    pitch_ = row_pitch(E::packed_bytes(units_));
    size_ = rows * pitch_;
    memory_.reset((uint8_t *)std::aligned_alloc(kCacheLineBytes, size_));
    return bool(memory_);
  }
  const uint8_t *row(int64_t r) const { return memory_.get() + r * pitch_; }

  template <class E>
  bool pack(int64_t r, const void *row, int32_t dtype) {
    float *natural = (float *)workspace.take(units_ * E::kUnit * 4);
    if (natural) E::pack(row, dtype, k_, units_, natural, memory_.get() + r * pitch_);
    return natural;
  }

 private:
  struct Free {
    void operator()(uint8_t *p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t k_ = 0, units_ = 0, pitch_ = 0, size_ = 0;
};

// Weight rows per task of `n_rows` in all: few tasks for few threads, and each large enough to stream.
static int64_t chunk_rows(const fk_matrix &m, int32_t n_threads, int64_t n_rows) {
  if (n_threads <= 1) return m.n;
  int64_t row_bytes = std::max<int64_t>(1, m.k * (m.scheme == FK_W_FLOAT32 ? 8 : m.scheme <= FK_W_FLOAT16 ? 4 : m.scheme == FK_W_INT8 || m.scheme == FK_W_FP8 ? 2 : 1) / 2);
  int64_t least = std::max<int64_t>(1, kMinChunkBytes / row_bytes), fair = n_rows / (4 * n_threads);
  int64_t chunk = std::min(std::max(least, fair), (n_rows + n_threads - 1) / n_threads);
  return std::min(m.n, (chunk + kTileRows - 1) / kTileRows * kTileRows);
}

static void add_bias(const fk_matrix &m, int64_t begin, int64_t end, int64_t rows, float *product, int64_t stride) {
  if (!m.bias) return;
  float bias[kTileRows];
  for (int64_t c = begin; c < end; c += kTileRows) {
    int64_t count = std::min(kTileRows, end - c);
    to_floats(m.bias, m.bias_dtype, c, count, bias);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < count; ++i) product[r * stride + c + i] += bias[i];
  }
}

// Runs tasks that may run out of memory.
template <class F>
static int32_t run_tasks(int64_t count, int32_t n_threads, F &&task) {
  std::atomic<bool> is_ok{true};
  fk::parallel(count, n_threads, [&](int64_t i) {
    if (!task(i)) is_ok.store(false, std::memory_order_relaxed);
  });
  return is_ok ? 0 : FK_E_MEMORY;
}

constexpr int64_t kRowsPerTask = 8;

template <class F>
static int32_t for_rows(int64_t rows, int32_t n_threads, F &&f) {
  int64_t n_tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  return run_tasks(n_tasks, n_threads, [&](int64_t i) {
    for (int64_t r = i * kRowsPerTask, end = std::min(r + kRowsPerTask, rows); r < end; ++r)
      if (!f(r)) return false;
    return true;
  });
}

// Matrices that are stored alike, each with a place for its product with the same rows.
struct LinearPart {
  const fk_matrix *w;
  float *product;  // [rows, w->n]
  int64_t stride;
};

static bool is_stored_alike(const fk_matrix &a, const fk_matrix &b) {
  return a.scheme == b.scheme && a.group == b.group && !a.zeros == !b.zeros;
}

// One parallel loop over the rows of all matrices. on_columns(part, begin, end) follows each task.
template <class F>
static int32_t multiply_parts(const LinearPart *parts, int64_t n_parts, const void *x, int32_t x_dtype,
                              int64_t x_stride, int64_t rows, int32_t n_threads, F &&on_columns) {
  return with_engine(*parts[0].w, x_dtype, [&](auto engine) -> int32_t {
    using E = decltype(engine);
    PackedRows input;
    if (!input.reserve<E>(rows, parts[0].w->k)) return FK_E_MEMORY;
    std::unique_ptr<const uint8_t *[]> pointers(new (std::nothrow) const uint8_t *[rows]);
    if (!pointers) return FK_E_MEMORY;
    for (int64_t r = 0; r < rows; ++r) pointers[r] = input.row(r);
    int32_t status = for_rows(rows, n_threads, [&](int64_t r) {
      return input.pack<E>(r, (const uint8_t *)x + r * x_stride * dtype_bytes(x_dtype), x_dtype);
    });
    if (status) return status;
    int64_t n_columns = 0, n_tasks = 0;
    for (int64_t p = 0; p < n_parts; ++p) n_columns += parts[p].w->n;
    int64_t chunk = chunk_rows(*parts[0].w, n_threads, n_columns);
    for (int64_t p = 0; p < n_parts; ++p) n_tasks += (parts[p].w->n + chunk - 1) / chunk;
    return run_tasks(n_tasks, n_threads, [&](int64_t i) {
      const LinearPart *part = parts;
      for (int64_t n; i >= (n = (part->w->n + chunk - 1) / chunk); ++part) i -= n;
      int64_t begin = i * chunk, end = std::min(begin + chunk, part->w->n);
      if (!Product<E>(*part->w).multiply(begin, end, pointers.get(), rows, part->product + begin, part->stride))
        return false;
      add_bias(*part->w, begin, end, rows, part->product, part->stride);
      on_columns(*part, begin, end);
      return true;
    });
  });
}

static int32_t linear(const fk_matrix &w, const void *x, int32_t x_dtype, int64_t x_stride,
                      int64_t rows, void *out, int32_t out_dtype, int64_t out_stride,
                      int32_t n_threads) {
  fk::Call call(n_threads);
  Floats product;
  bool is_direct = out_dtype == FK_FLOAT32;
  if (!is_direct && !allocate(product, rows * w.n)) return FK_E_MEMORY;
  LinearPart whole{&w, is_direct ? (float *)out : product.get(), is_direct ? out_stride : w.n};
  return multiply_parts(&whole, 1, x, x_dtype, x_stride, rows, n_threads, [&](const LinearPart &, int64_t begin, int64_t end) {
    if (is_direct) return;
    for (int64_t r = 0; r < rows; ++r)
      from_floats(product.get() + r * w.n + begin, end - begin,
                  (uint8_t *)out + (r * out_stride + begin) * dtype_bytes(out_dtype), out_dtype);
  });
}

constexpr int64_t kMaxParts = 3;

// out[p][rows, n] = x[rows, k] times each of up to kMaxParts matrices.
static int32_t multiply(const fk_matrix *const *w, float *const *out, int64_t count, const float *x, int64_t rows,
                        int32_t n_threads) {
  LinearPart parts[kMaxParts];
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    for (; end < count && is_stored_alike(*w[begin], *w[end]); ++end) parts[end - begin] = {w[end], out[end], w[end]->n};
    int32_t status = multiply_parts(parts, end - begin, x, FK_FLOAT32, w[begin]->k, rows, n_threads,
                                    [](const LinearPart &, int64_t, int64_t) {});
    if (status) return status;
  }
  return 0;
}

// Groups of pairs whose matrices are stored alike, computed together.
struct Wave {
  int64_t first_group, n_groups;
  const int64_t *starts;  // of each group's pairs in the wave; one more entry at the end
  int64_t n_pairs() const { return starts[n_groups]; }
};

// product[pairs, n] of a wave's pairs with the matrices of their groups.
template <class E>
static int32_t multiply_wave(const Wave &wave, const fk_matrix *matrices, const uint8_t *const *x, float *product,
                             int32_t n_threads) {
  const fk_matrix *of_wave = matrices + wave.first_group;
  int64_t n = of_wave[0].n, chunk = chunk_rows(of_wave[0], n_threads, n * wave.n_groups);
  int64_t n_chunks = (n + chunk - 1) / chunk;
  return run_tasks(wave.n_groups * n_chunks, n_threads, [&](int64_t i) {
    const fk_matrix &m = of_wave[i / n_chunks];
    int64_t start = wave.starts[i / n_chunks], rows = wave.starts[i / n_chunks + 1] - start;
    int64_t begin = i % n_chunks * chunk, end = std::min(begin + chunk, n);
    float *to = product + start * n;
    if (!Product<E>(m).multiply(begin, end, x + start, rows, to + begin, n)) return false;
    add_bias(m, begin, end, rows, to, n);
    return true;
  });
}

// One call of `experts`, wave by wave.
struct ExpertsCall {
  const fk_matrix *first, *down;
  const fk_gating &gating;
  const fk_pairs &pairs;
  const void *x;
  int32_t x_dtype;
  int64_t x_stride, rows;
  int32_t n_threads;

  PackedRows input;
  int input_key = -1;  // of the engine that `input` is packed for
  Floats product, output;
  std::unique_ptr<const uint8_t *[]> pointers;

  // output[pairs, h] of a wave, whose first pair is `begin`.
  int32_t compute(const Wave &wave, int64_t begin) {
    int64_t n = wave.n_pairs(), wide = first->n, h = down->n;
    pointers.reset(new (std::nothrow) const uint8_t *[n]);
    if (!pointers || !allocate(product, n * wide) || !allocate(output, n * h)) return FK_E_MEMORY;
    int32_t status = with_engine(first[wave.first_group], x_dtype, [&](auto engine) -> int32_t {
      using E = decltype(engine);
      if (int32_t e = pack_input<E>()) return e;
      for (int64_t p = 0; p < n; ++p) pointers[p] = input.row(pairs.rows[begin + p]);
      return multiply_wave<E>(wave, first, pointers.get(), product.get(), n_threads);
    });
    if (status) return status;
    return with_engine(down[wave.first_group], FK_FLOAT32, [&](auto engine) -> int32_t {
      using E = decltype(engine);
      PackedRows hidden;
      if (!hidden.reserve<E>(n, down->k)) return FK_E_MEMORY;
      if (int32_t e = for_rows(n, n_threads, [&](int64_t p) {
            float *row = product.get() + p * wide;
            apply_gating(gating, row, down->k, row);
            pointers[p] = hidden.row(p);
            return hidden.pack<E>(p, row, FK_FLOAT32);
          }))
        return e;
      return multiply_wave<E>(wave, down, pointers.get(), output.get(), n_threads);
    });
  }

  template <class E>
  int32_t pack_input() {
    if (input_key == E::kKey) return 0;
    if (!input.reserve<E>(rows, first->k)) return FK_E_MEMORY;
    input_key = E::kKey;
    return for_rows(rows, n_threads, [&](int64_t r) {
      return input.pack<E>(r, (const uint8_t *)x + r * x_stride * dtype_bytes(x_dtype), x_dtype);
    });
  }
};

// Writes a wave's outputs, or adds them to rows of total[.., h]; in parallel over columns.
static void collect(const fk_pairs &pairs, int64_t begin, int64_t n, const float *output, int64_t h, float *total,
                    void *out, int32_t out_dtype, int64_t out_stride, int32_t n_threads) {
  const int64_t *to_rows = pairs.positions ? pairs.positions : pairs.rows;
  int64_t chunk = n * h < 64 << 10 ? h : aligned((h + n_threads - 1) / n_threads);
  fk::parallel((h + chunk - 1) / chunk, n_threads, [&](int64_t i) {
    int64_t c0 = i * chunk, count = std::min(chunk, h - c0);
    float scaled[256];
    for (int64_t p = 0; p < n; ++p) {
      float weight = pairs.weights[begin + p];
      const float *from = output + p * h + c0;
      if (total) {
        float *sum = total + to_rows[begin + p] * h + c0;
        for (int64_t c = 0; c < count; ++c) sum[c] += from[c] * weight;
        continue;
      }
      uint8_t *to = (uint8_t *)out + (to_rows[begin + p] * out_stride + c0) * dtype_bytes(out_dtype);
      for (int64_t c = 0; c < count; c += 256) {
        int64_t some = std::min<int64_t>(256, count - c);
        for (int64_t j = 0; j < some; ++j) scaled[j] = from[c + j] * weight;
        from_floats(scaled, some, to + c * dtype_bytes(out_dtype), out_dtype);
      }
    }
  });
}

static int32_t experts(const fk_matrix *first, const fk_matrix *down, const fk_gating &gating,
                       const fk_pairs &pairs, const void *x, int32_t x_dtype, int64_t x_stride,
                       int64_t rows, int32_t reduction, void *out, int32_t out_dtype,
                       int64_t out_stride, int32_t n_threads) {
  fk::Call threads(n_threads);
  int64_t h = down[0].n, n_out = pairs.positions ? pairs.n_out : rows;
  std::unique_ptr<int64_t[]> starts(new (std::nothrow) int64_t[pairs.n_groups + 1]);
  Floats sums;
  bool is_direct = out_dtype == FK_FLOAT32 && out_stride == h;
  if (!starts || (reduction && !is_direct && !allocate(sums, n_out * h))) return FK_E_MEMORY;
  float *total = !reduction ? nullptr : is_direct ? (float *)out : sums.get();
  if (total && reduction != FK_ADDED) std::memset(total, 0, n_out * h * sizeof(float));
  ExpertsCall call{first, down, gating, pairs, x, x_dtype, x_stride, rows, n_threads, {}, -1, {}, {}, {}};
  for (int64_t g = 0, begin = 0; g < pairs.n_groups;) {
    Wave wave{g, 0, starts.get()};
    for (starts[0] = 0; g < pairs.n_groups; ++g) {
      int64_t n = wave.n_groups;
      bool fits = n == 0 || (starts[n] + pairs.group_sizes[g] <= kPairsPerWave &&
                             is_stored_alike(first[g], first[g - 1]) && is_stored_alike(down[g], down[g - 1]));
      if (!fits) break;
      starts[n + 1] = starts[n] + pairs.group_sizes[g];
      ++wave.n_groups;
    }
    if (int32_t status = call.compute(wave, begin)) return status;
    collect(pairs, begin, wave.n_pairs(), call.output.get(), h, total, out, out_dtype, out_stride, n_threads);
    begin += wave.n_pairs();
  }
  if (sums)
    for (int64_t r = 0; r < n_out; ++r)
      from_floats(total + r * h, h, (uint8_t *)out + r * out_stride * dtype_bytes(out_dtype), out_dtype);
  return 0;
}
