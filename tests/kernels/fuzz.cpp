// Calls the library with random shapes and exactly sized buffers, for a build with sanitizers.
// Every output is compared with a plain double-precision reference.
//
//   fuzz kernels SEED CASES
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "faasmoe_kernels.h"
#include "router_ops.h"

namespace {

std::mt19937_64 random_bits;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}
float normal() { return std::normal_distribution<float>()(random_bits); }

[[noreturn]] void fail(const char *what) {
  std::printf("FAILED: %s (isa %s): %s\n", what, fk_isa(), fk_last_error());
  std::exit(1);
}

// Memory without slack, at an odd alignment if the type allows it.
template <class T>
using Buffer = std::vector<T>;

struct Dense {
  fk_matrix matrix{};
  Buffer<uint8_t> codes, lower, upper;  // and where the matrix has them, if elsewhere
  Buffer<float> scales, zeros, bias, factors;
  Buffer<uint8_t> stored_scales, stored_zeros, upper_scales;
  std::vector<double> values;
};

float from_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// A bfloat16 or float16 with few mantissa bits, so that both have simple exact values.
struct Half {
  uint16_t bf16, f16;
  float value;
};
Half random_half() {
  int mantissa = int(pick(0, 7)), exponent = int(pick(-3, 0)), sign = int(pick(0, 1));
  Half h;
  h.bf16 = uint16_t(sign << 15 | (exponent + 127) << 7 | mantissa << 4);
  h.f16 = uint16_t(sign << 15 | (exponent + 15) << 10 | mantissa << 7);
  h.value = from_bf16(h.bf16);
  return h;
}

// Parameters in memory as one of their types; they become the values that they have there.
int32_t store_parameters(Buffer<float> &values, bool are_scales, Buffer<uint8_t> &bytes) {
  int32_t dtype = int32_t(pick(FK_P_FLOAT32, 3));
  if (dtype == 3) dtype = are_scales ? FK_P_E8M0 : FK_P_UINT8;
  int64_t size = dtype == FK_P_FLOAT32 ? 4 : dtype <= FK_P_FLOAT16 ? 2 : 1;
  bytes.resize(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    float &v = values[i];
    int exponent;
    float mantissa = std::frexp(v, &exponent);  // 0.5 to 1
    if (dtype == FK_P_FLOAT32) {
      std::memcpy(&bytes[4 * i], &v, 4);
    } else if (dtype == FK_P_UINT8) {
      bytes[i] = uint8_t(v);
    } else if (dtype == FK_P_E8M0) {
      bytes[i] = uint8_t(exponent + 127);
      v = std::ldexp(1.0f, exponent);
    } else {  // few bits of mantissa, as random_half
      int steps = v == 0 ? 0 : int(mantissa * 16) - 8;
      v = v == 0 ? 0 : std::ldexp(float(8 + steps) / 8, exponent - 1);
      uint16_t half = v == 0 ? 0 : dtype == FK_P_BFLOAT16 ? uint16_t((exponent + 126) << 7 | steps << 4)
                                                          : uint16_t((exponent + 14) << 10 | steps << 7);
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  return dtype;
}

void set_half(Buffer<uint8_t> &bytes, int64_t i, int32_t is_bf16, const Half &h) {
  std::memcpy(&bytes[2 * i], is_bf16 ? &h.bf16 : &h.f16, 2);
}

// The value of an E4M3 code that is no NaN.
double e4m3(uint8_t code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  double v = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 0x80 ? -v : v;
}
uint8_t random_e4m3(int64_t largest) {
  uint8_t code = uint8_t(pick(0, largest));
  return (code & 0x7f) == 0x7f ? 0 : code;
}

// NVFP4: E4M3 scales, and a factor for all rows or for each half.
void make_nvfp4_scales(Dense &d, int64_t n) {
  int64_t n_factors = n % 2 == 0 ? pick(0, 2) : pick(0, 1), groups = int64_t(d.scales.size()) / n;
  d.stored_scales.resize(d.scales.size());
  for (size_t i = 0; i < d.scales.size(); ++i) {
    d.stored_scales[i] = random_e4m3(n_factors ? 0x7e : 0x20);
    d.scales[i] = float(e4m3(d.stored_scales[i]));
  }
  for (int64_t f = 0; f < n_factors; ++f) d.factors.push_back(float(pick(1, 8)) / 65536);
  for (int64_t i = 0; i < int64_t(d.scales.size()); ++i)
    if (n_factors) d.scales[i] *= d.factors[n_factors == 2 && i / groups >= n / 2];
  d.matrix.factors = n_factors ? d.factors.data() : nullptr;
  d.matrix.factors_upper = n_factors == 2 ? d.factors.data() + 1 : nullptr;
}

// Moves codes to any address, and at times their upper rows to another, with their scales.
void place_elsewhere(Dense &d, int64_t n) {
  int64_t bytes = int64_t(d.codes.size()), shift = pick(0, 9);
  int64_t lower = n % 2 == 0 && pick(0, 1) ? bytes / 2 : bytes;
  d.lower.resize(shift + lower);
  std::memcpy(d.lower.data() + shift, d.codes.data(), lower);
  d.matrix.codes = d.lower.data() + shift;
  if (lower == bytes) return;
  d.upper.resize(shift + bytes - lower);
  std::memcpy(d.upper.data() + shift, d.codes.data() + lower, bytes - lower);
  d.matrix.codes_upper = d.upper.data() + shift;
  if (d.stored_scales.empty() || !d.zeros.empty() || d.matrix.group_rows > 1) return;
  int64_t half = int64_t(d.stored_scales.size()) / 2;
  d.upper_scales.resize(shift + half);
  std::memcpy(d.upper_scales.data() + shift, d.stored_scales.data() + half, half);
  d.matrix.scales_upper = d.upper_scales.data() + shift;
}

Dense random_matrix(int32_t scheme, int64_t n, int64_t k, int32_t group) {
  static const double e2m1[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  Dense d;
  d.values.resize(n * k);
  int64_t groups = group ? (k + group - 1) / group : 1;
  bool is_float = scheme < FK_W_INT8, is_4bit = scheme > FK_W_INT8 && scheme != FK_W_FP8;
  int64_t group_rows = scheme == FK_W_FP8 ? pick(1, pick(0, 1) ? 1 : n + 2) : 1;
  if (!is_float) {
    d.scales.resize((n + group_rows - 1) / group_rows * groups);
    for (float &s : d.scales) s = 0.02f + 0.01f * std::abs(normal());
    if (scheme == FK_W_INT8)
      for (float &s : d.scales) s /= 32;
    if (scheme == FK_W_FP8)
      for (float &s : d.scales) s /= 64;
    if ((scheme == FK_W_INT4 || scheme == FK_W_INT8) && pick(0, 1)) {
      d.zeros.resize(n * groups);
      for (float &z : d.zeros) z = float(pick(0, scheme == FK_W_INT4 ? 15 : 255));
    }
  }
  int32_t scale_dtype = d.scales.empty() ? 0 : FK_P_E4M3;
  if (scheme == FK_W_NVFP4)
    make_nvfp4_scales(d, n);
  else if (!d.scales.empty())
    scale_dtype = store_parameters(d.scales, true, d.stored_scales);
  int32_t zero_dtype = d.zeros.empty() ? 0 : store_parameters(d.zeros, false, d.stored_zeros);
  int64_t bytes = is_4bit ? n * k / 2 : n * k * (scheme == FK_W_FLOAT32 ? 4 : is_float ? 2 : 1);
  d.codes.resize(bytes);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < k; ++c) {
      int64_t i = r * k + c, g = r / group_rows * groups + (group ? c / group : 0);
      if (scheme == FK_W_FLOAT32) {
        float v = normal() * 0.1f;
        std::memcpy(&d.codes[4 * i], &v, 4);
        d.values[i] = v;
      } else if (is_float) {
        Half h = random_half();
        set_half(d.codes, i, scheme == FK_W_BFLOAT16, h);
        d.values[i] = h.value;
      } else if (scheme == FK_W_INT8) {
        int8_t code = int8_t(pick(-128, 127));
        d.codes[i] = uint8_t(code);
        d.values[i] = (code + (d.zeros.empty() ? 0.0 : 128 - double(d.zeros[g]))) * d.scales[g];
      } else if (scheme == FK_W_FP8) {
        d.codes[i] = random_e4m3(255);
        d.values[i] = e4m3(d.codes[i]) * d.scales[g];
      } else {
        int code = int(pick(0, 15));
        d.codes[i / 2] |= uint8_t(code << (c % 2 * 4));
        double level = scheme == FK_W_INT4 ? code - (d.zeros.empty() ? 8.0 : double(d.zeros[g]))
                                           : (code & 8 ? -e2m1[code & 7] : e2m1[code & 7]);
        d.values[i] = level * d.scales[g];
      }
    }
  if (pick(0, 1)) {
    d.bias.resize(n);
    for (float &b : d.bias) b = normal();
  }
  auto address = [](auto &v) { return v.empty() ? nullptr : v.data(); };
  d.matrix = {scheme, group, n, k, d.codes.data(), address(d.stored_scales), address(d.stored_zeros),
              address(d.bias), scale_dtype, zero_dtype, FK_P_FLOAT32, int32_t(group_rows), nullptr, nullptr,
              d.matrix.factors, d.matrix.factors_upper};
  if (pick(0, 1)) place_elsewhere(d, n);
  return d;
}

// A scheme with a group, and what its k must be a multiple of.
void pick_scheme(int32_t *scheme, int32_t *group, int64_t *step) {
  *scheme = int32_t(pick(FK_W_FLOAT32, FK_W_NVFP4));
  *group = *scheme == FK_W_NVFP4   ? 16
           : *scheme == FK_W_MXFP4 ? 32
           : *scheme < FK_W_INT8   ? 0
                                   : int32_t(32 * pick(0, *scheme == FK_W_FP8 ? 4 : 3));
  *step = *scheme == FK_W_FP8 ? 1 : *group ? *group : *scheme == FK_W_INT4 ? 2 : 1;
}

struct Input {
  Buffer<uint8_t> bytes;
  std::vector<double> values;
  int32_t dtype;
  int64_t stride;
};

Input random_input(int64_t rows, int64_t k, int64_t slack) {
  Input x;
  x.dtype = int32_t(pick(FK_FLOAT32, FK_FLOAT16));
  x.stride = k + slack;
  int64_t count = (rows - 1) * x.stride + k, size = x.dtype == FK_FLOAT32 ? 4 : 2;
  x.bytes.resize(count * size);
  x.values.resize(rows * k);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < k; ++c) {
      Half h = random_half();
      int64_t i = r * x.stride + c;
      if (x.dtype == FK_FLOAT32)
        std::memcpy(&x.bytes[4 * i], &h.value, 4);
      else
        set_half(x.bytes, i, x.dtype == FK_BFLOAT16, h);
      x.values[r * k + c] = h.value;
    }
  return x;
}

// Length of the products that output n sums: what rounding is relative to, however much of them cancels.
double products_norm(const Dense &w, int64_t n, const double *x) {
  double squares = 0;
  for (int64_t k = 0; k < w.matrix.k; ++k) {
    double product = w.values[n * w.matrix.k + k] * x[k];
    squares += product * product;
  }
  return std::sqrt(squares);
}

std::vector<double> product(const Dense &w, const double *x) {
  std::vector<double> out(w.matrix.n);
  for (int64_t n = 0; n < w.matrix.n; ++n) {
    out[n] = w.bias.empty() ? 0 : w.bias[n];
    for (int64_t k = 0; k < w.matrix.k; ++k) out[n] += w.values[n * w.matrix.k + k] * x[k];
  }
  return out;
}

void check_close(double actual, double expected, double scale, const char *what) {
  if (!(std::abs(actual - expected) <= 1e-4 * (1 + scale))) {
    std::printf("got %.9g, expected %.9g\n", actual, expected);
    fail(what);
  }
}

void fuzz_linear() {
  int32_t scheme, group;
  int64_t step;
  pick_scheme(&scheme, &group, &step);
  int64_t widest = pick(0, 9) ? 200 : 2400;  // beyond what stays in the first-level cache
  int64_t n = pick(1, 70), k = step * pick(1, std::max<int64_t>(1, widest / step)), rows = pick(1, 30);
  Dense w = random_matrix(scheme, n, k, group);
  Input x = random_input(rows, k, pick(0, 3));
  int64_t out_stride = n + pick(0, 3);
  Buffer<float> out((rows - 1) * out_stride + n);
  if (fk_linear(&w.matrix, x.bytes.data(), x.dtype, x.stride, rows, out.data(), FK_FLOAT32, out_stride,
                int32_t(pick(1, 3))))
    fail("linear");
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> expected = product(w, &x.values[r * k]);
    for (int64_t c = 0; c < n; ++c)
      check_close(out[r * out_stride + c], expected[c], products_norm(w, c, &x.values[r * k]), "linear's output");
  }
}

double activate(const fk_gating &g, double v) {
  auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  switch (g.activation) {
    case FK_SILU: return v * sigmoid(v);
    case FK_GELU: return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case FK_GELU_TANH: return 0.5 * v * (1 + std::tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
    case FK_RELU: return std::max(v, 0.0);
    case FK_RELU2: return std::max(v, 0.0) * std::max(v, 0.0);
    default: return sigmoid(v);
  }
}

std::vector<double> gated(const fk_gating &g, const std::vector<double> &p, int64_t inter) {
  std::vector<double> hidden(inter);
  for (int64_t i = 0; i < inter; ++i) {
    double gate = g.is_gated && g.interleaved ? p[2 * i] : p[i];
    double up = !g.is_gated ? 1 : g.interleaved ? p[2 * i + 1] : p[inter + i];
    if (g.activation == FK_CLAMPED_SWIGLU) {
      gate = std::min<double>(gate, g.limit);
      up = std::clamp<double>(up, -g.limit, g.limit);
      hidden[i] = (up + 1) * gate / (1 + std::exp(-g.alpha * gate));
    } else {
      hidden[i] = activate(g, gate) * up;
    }
  }
  return hidden;
}

void fuzz_experts() {
  int32_t scheme, group;
  int64_t step;
  pick_scheme(&scheme, &group, &step);
  int64_t h = step * pick(1, std::max<int64_t>(1, 100 / step));
  int64_t inter = step * pick(1, std::max<int64_t>(1, 100 / step)), rows = pick(1, 20);
  fk_gating gating{int32_t(pick(FK_SILU, FK_CLAMPED_SWIGLU)), int32_t(pick(0, 1)), int32_t(pick(0, 1)),
                   1.702f, 0.7f};
  if (gating.activation == FK_CLAMPED_SWIGLU) gating.is_gated = 1;
  Input x = random_input(rows, h, 0);
  int64_t n_groups = pick(1, 4);
  std::vector<Dense> first, down;
  Buffer<fk_matrix> first_matrices, down_matrices;
  Buffer<int64_t> sizes, pair_rows, positions;
  Buffer<float> weights;
  for (int64_t g = 0; g < n_groups; ++g) {
    first.push_back(random_matrix(scheme, gating.is_gated ? 2 * inter : inter, h, group));
    down.push_back(random_matrix(scheme, h, inter, group));
    sizes.push_back(pick(1, 15));
    for (int64_t i = 0; i < sizes.back(); ++i) {
      pair_rows.push_back(pick(0, rows - 1));
      weights.push_back(float(pick(1, 100)) / 100);
      positions.push_back(int64_t(positions.size()));
    }
  }
  for (auto &d : first) first_matrices.push_back(d.matrix);
  for (auto &d : down) down_matrices.push_back(d.matrix);
  std::shuffle(positions.begin(), positions.end(), random_bits);
  int32_t is_reduced = int32_t(pick(0, 1));
  int64_t n_pairs = int64_t(pair_rows.size()), out_rows = is_reduced ? rows : n_pairs;
  bool is_placed = is_reduced && pick(0, 1);  // sums of pairs go to rows of their own choice
  if (is_placed) {
    out_rows = pick(1, 12);
    for (int64_t &position : positions) position = pick(0, out_rows - 1);
  }
  Buffer<float> wide(out_rows * h);
  Buffer<uint16_t> narrow;
  int32_t dtype = x.dtype;
  if (dtype != FK_FLOAT32) narrow.resize(out_rows * h);
  void *out = dtype == FK_FLOAT32 ? (void *)wide.data() : (void *)narrow.data();
  fk_pairs pairs{n_groups, sizes.data(), pair_rows.data(), is_reduced && !is_placed ? nullptr : positions.data(),
                 weights.data(), out_rows};
  int32_t n_threads = int32_t(pick(1, 3));
  if (fk_experts(first_matrices.data(), down_matrices.data(), &gating, &pairs, x.bytes.data(), dtype, h, rows,
                 is_reduced, out, dtype, h, n_threads))
    fail("experts");
  // The same with float32 outputs is compared; the half ones only have to be written in bounds.
  if (fk_experts(first_matrices.data(), down_matrices.data(), &gating, &pairs, x.bytes.data(), dtype, h, rows,
                 is_reduced, wide.data(), FK_FLOAT32, h, n_threads))
    fail("experts");
  std::vector<double> expected(out_rows * h), magnitude(out_rows * h);
  for (int64_t g = 0, p = 0; g < n_groups; ++g)
    for (int64_t i = 0; i < sizes[g]; ++i, ++p) {
      std::vector<double> hidden = gated(gating, product(first[g], &x.values[pair_rows[p] * h]), inter);
      std::vector<double> result = product(down[g], hidden.data());
      int64_t row = is_reduced && !is_placed ? pair_rows[p] : positions[p];
      double size = 0;  // of what is summed: large terms may cancel
      for (double v : hidden) size += std::abs(v);
      for (int64_t c = 0; c < h; ++c) {
        expected[row * h + c] += result[c] * weights[p];
        magnitude[row * h + c] += size + std::abs(result[c]);
      }
    }
  for (int64_t i = 0; i < out_rows * h; ++i)
    check_close(wide[i], expected[i], magnitude[i], "experts' output");
}

// What may be drawn: by rank, by the share of more likely tokens, and by likelihood beside the highest.
void check_draw(const float *scores, int64_t vocabulary, const fk_draw &d, int32_t token) {
  if (token < 0 || token >= vocabulary) fail("draw's token is none");
  float peak = *std::max_element(scores, scores + vocabulary);
  double temperature = std::max(double(d.temperature), 1.2e-38), total = 0, higher = 0;
  int64_t n_higher = 0;
  std::vector<double> kept;
  for (int64_t i = 0; i < vocabulary; ++i) {
    double likelihood = std::exp((double(scores[i]) - peak) / temperature);
    if (likelihood >= d.min_p) kept.push_back(likelihood);
    if (scores[i] > scores[token]) higher += likelihood, ++n_higher;
  }
  std::sort(kept.rbegin(), kept.rend());
  if (d.top_k > 0 && d.top_k < int64_t(kept.size())) kept.resize(d.top_k);
  for (double likelihood : kept) total += likelihood;
  if (d.top_k > 0 && n_higher >= d.top_k) fail("draw beyond top_k");
  if (n_higher && higher > d.top_p * total + 1e-4 * (1 + total)) fail("draw beyond top_p");
  if (std::exp((double(scores[token]) - peak) / temperature) < d.min_p - 1e-4) fail("draw below min_p");
}

void fuzz_draws() {
  int64_t rows = pick(1, 4), vocabulary = pick(0, 3) ? pick(1, 300) : pick(1, 5000), n_draws = pick(0, rows);
  Buffer<float> scores(rows * vocabulary);
  for (float &score : scores) score = pick(0, 20) ? float(pick(-40, 40)) / 4 : pick(0, 1) ? -INFINITY : normal();
  for (int64_t r = 0; r < rows; ++r) scores[r * vocabulary + pick(0, vocabulary - 1)] = normal();
  Buffer<fk_draw> draws(n_draws);  // each of another row
  for (int64_t i = 0; i < n_draws; ++i)
    draws[i] = {i, pick(0, 1) * pick(1, vocabulary + 1), pick(0, 1) ? 1.0 : double(pick(0, 100)) / 100,
                double(pick(0, 1) * pick(0, 100)) / 100, double(pick(0, 999)) / 1000, float(pick(0, 30)) / 10};
  Buffer<int32_t> one(rows, -1), several(rows, -1);
  if (fk_draw_tokens(scores.data(), rows, vocabulary, draws.data(), n_draws, one.data(), 1)) fail("draws");
  if (fk_draw_tokens(scores.data(), rows, vocabulary, draws.data(), n_draws, several.data(), 3)) fail("draws");
  if (one != several) fail("draws depend on threads");
  for (int64_t i = 0; i < n_draws; ++i) check_draw(&scores[i * vocabulary], vocabulary, draws[i], one[i]);
}

}  // namespace

void fuzz_kernels(uint64_t seed, int64_t cases) {
  random_bits.seed(seed);
  std::vector<const char *> isas;
  for (const char *name : {"avx512_bf16", "avx512", "avx2", "neon", "portable"})
    if (!fk_set_isa(name)) isas.push_back(name);
  for (int64_t i = 0; i < cases; ++i) {
    fk_set_isa(isas[i % isas.size()]);
    switch (pick(0, 4)) {
      case 0: fuzz_draws(); break;
      case 1:
      case 2: fuzz_linear(); break;
      default: fuzz_experts();
    }
  }
  std::printf("%lld cases with", (long long)cases);
  for (const char *name : isas) std::printf(" %s", name);
  std::printf("\n");
}
