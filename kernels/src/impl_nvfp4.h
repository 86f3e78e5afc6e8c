// Scales of NVFP4: E4M3, one per 16 columns, times a float32 factor of all or half of the rows; a part
// of kernels_impl.h. Codes are MXFP4's.

template <>
struct GroupScales<Scaling::kGroups16> {
  static constexpr int64_t kPerUnit = kUnitColumns / 16;
  const fk_matrix &m;
  int64_t groups;

  explicit GroupScales(const fk_matrix &matrix) : m(matrix), groups(matrix.k / 16) {}
  static int64_t floats(const fk_matrix &m) { return (m.k + kUnitColumns - 1) / kUnitColumns * kPerUnit; }
  // Of `rows` weight rows; row after row.
  void read(int64_t row, int64_t rows, float *to) const {
    for (int64_t r = 0; r < rows; ++r) read_row(row + r, to + r * floats(m));
  }

 private:
  void read_row(int64_t row, float *to) const {
    bool is_upper = row >= m.n / 2;
    const void *from = m.factors_upper && is_upper ? m.factors_upper : m.factors;
    float factor = (from ? load<float>(from) : 1) * kE4m3Scale;
    const uint8_t *codes = (const uint8_t *)m.scales + row * groups;
    if (m.scales_upper && is_upper) codes = (const uint8_t *)m.scales_upper + (row - m.n / 2) * groups;
    int64_t i = 0;
    for (; i + 2 * L <= groups; i += 2 * L) {
      vf scales[2];
      decode_e4m3(codes + i, scales);
      store(to + i, scales[0] * splat(factor));
      store(to + i + L, scales[1] * splat(factor));
    }
    uint8_t rest[2 * L] = {};
    vf scales[2];
    float last[2 * L];
    std::memcpy(rest, codes + i, groups - i);
    decode_e4m3(rest, scales);
    store(last, scales[0] * splat(factor));
    store(last + L, scales[1] * splat(factor));
    for (int64_t j = 0, count = floats(m) - i; j < count; ++j) to[i + j] = j < 2 * L ? last[j] : 0;
  }
};
