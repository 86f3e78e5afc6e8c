// What stands between an expert's two projections; a part of kernels_impl.h.

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

// hidden[i] from one row of the first projection's product, which may be the same memory.
static void apply_gating(const fk_gating &g, const float *product, int64_t i, float *hidden) {
  int64_t j = 0;
  if (!g.is_gated || !g.interleaved)
    for (; j + L <= i; j += L) {
      vf gate = load<vf>(product + j);
      store(hidden + j, g.is_gated ? gate_times_up(g, gate, load<vf>(product + i + j)) : activate(g, gate));
    }
  for (; j < i; j += L) {
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
