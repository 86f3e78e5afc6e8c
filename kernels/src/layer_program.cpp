// Runs decoder layers of a batch in one call: norms, projections, attention, gates and shared experts
// here, routed experts through the port.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "router_ops.h"
#include "thread_pool.h"

namespace fk {

int32_t check_batch(const fk_attention &a, const fk_attention_batch &b, int64_t rows);

namespace {

constexpr int32_t kBegunHere = 2;  // by a port's `begin`: no other process computes

constexpr int64_t kSerialProduct = 1 << 20;  // multiplications below which one thread is faster

struct Buffers {
  std::vector<float> normed, query, key, value, attended, added, gates, ups, shared, logits, experts, factors;
  std::vector<int64_t> index;
  std::vector<float> weight;
};

// A matrix and where its product goes.
struct Product {
  const fk_matrix &w;
  std::vector<float> &out;
};

// The products of the same rows with several matrices, as one parallel loop.
int32_t multiply(std::initializer_list<Product> products, const std::vector<float> &x, int64_t rows, int32_t n_threads) {
  const fk_matrix *matrices[3];
  float *out[3];
  int64_t count = 0, n_multiplications = 0;
  for (const Product &p : products) {
    p.out.resize(rows * p.w.n);
    matrices[count] = &p.w;
    out[count++] = p.out.data();
    n_multiplications += rows * p.w.n * p.w.k;
  }
  int32_t threads = n_multiplications < kSerialProduct ? 1 : n_threads;
  return router_ops().multiply(matrices, out, count, x.data(), rows, threads);
}

// Angles of one row rotate `width` elements of each head.
void rotate(int32_t rope, const float *cosines, const float *sines, int64_t width, int64_t n_heads, int64_t head_dim,
            float *row) {
  int64_t half = width / 2;
  bool is_pairs = rope == FK_ROPE_PAIRS || rope == FK_ROPE_PAIRS_NARROW;
  bool is_narrow = rope == FK_ROPE_HALVES_NARROW || rope == FK_ROPE_PAIRS_NARROW;
  for (int64_t h = 0; h < n_heads; ++h, row += head_dim)
    for (int64_t i = 0; i < half; ++i) {
      int64_t a = is_pairs ? 2 * i : i, b = is_pairs ? 2 * i + 1 : i + half;
      int64_t angle_a = is_narrow ? i : a, angle_b = is_narrow ? i : b;
      float x = row[a], y = row[b];
      row[a] = x * cosines[angle_a] - y * sines[angle_a];
      row[b] = y * cosines[angle_b] + x * sines[angle_b];
    }
}

// Scores outside of the best groups become minus infinity.
void exclude_groups(const fk_gate &gate, float *scores) {
  int64_t size = gate.weight.n / gate.n_groups;
  std::vector<std::pair<float, int64_t>> groups(gate.n_groups);
  std::vector<float> best(gate.scores_per_group);
  for (int64_t g = 0; g < gate.n_groups; ++g) {
    const float *begin = scores + g * size;
    std::partial_sort_copy(begin, begin + size, best.begin(), best.end(), std::greater<float>());
    float sum = 0;
    for (float score : best) sum += score;
    groups[g] = {-sum, g};
  }
  std::sort(groups.begin(), groups.end());
  for (int64_t i = gate.top_groups; i < gate.n_groups; ++i)
    std::fill_n(scores + groups[i].second * size, size, -INFINITY);
}

// The experts of a row and their weights, best first.
void choose_experts(const fk_gate &gate, float *logits, int64_t *index, float *weight, std::vector<float> &scores) {
  int64_t n = gate.weight.n;
  scores.resize(n);
  if (gate.scoring == FK_SCORE_SOFTMAX) {
    float highest = *std::max_element(logits, logits + n), sum = 0;
    for (int64_t e = 0; e < n; ++e) sum += scores[e] = std::exp(logits[e] - highest);
    for (int64_t e = 0; e < n; ++e) scores[e] /= sum;
  } else if (gate.scoring == FK_SCORE_SIGMOID) {
    for (int64_t e = 0; e < n; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  } else {
    std::copy(logits, logits + n, scores.begin());
  }
  // Logits are not needed any more: their place holds what the selection is made by.
  for (int64_t e = 0; e < n; ++e) logits[e] = scores[e] + (gate.selection_bias ? gate.selection_bias[e] : 0.0f);
  if (gate.top_groups < gate.n_groups) exclude_groups(gate, logits);
  for (int64_t k = 0; k < gate.top_k; ++k) {
    int64_t best = std::max_element(logits, logits + n) - logits;
    index[k] = best;
    weight[k] = scores[best];
    logits[best] = -INFINITY;
  }
  float sum = 0;
  if (gate.scoring == FK_SCORE_TOP_K_SOFTMAX) {
    float highest = weight[0];
    for (int64_t k = 0; k < gate.top_k; ++k) sum += weight[k] = std::exp(weight[k] - highest);
    for (int64_t k = 0; k < gate.top_k; ++k) weight[k] /= sum;
  } else if (gate.is_normalized) {
    for (int64_t k = 0; k < gate.top_k; ++k) sum += weight[k];
    for (int64_t k = 0; k < gate.top_k; ++k) weight[k] /= sum + gate.epsilon;
  }
  for (int64_t k = 0; k < gate.top_k; ++k) weight[k] *= gate.scale;
}

// `with_mlp`: whether the layer has a dense or shared MLP.
int32_t check_matrices(const fk_layer &l, bool with_mlp) {
  struct Named {
    const char *name;
    const fk_matrix &matrix;
    bool is_used;
  };
  bool has_gate = l.moe_layer >= 0, has_mlp_gate = with_mlp && l.mlp_gate.codes;
  const Named matrices[] = {{"query.", l.query, true},        {"key.", l.key, true},
                            {"value.", l.value, true},        {"output.", l.output, true},
                            {"gate.", l.gate.weight, has_gate}, {"mlp.gate.", l.mlp.gate, with_mlp},
                            {"mlp.up.", l.mlp.up, with_mlp},  {"mlp.down.", l.mlp.down, with_mlp},
                            {"mlp_gate.", l.mlp_gate, has_mlp_gate}};
  for (const Named &m : matrices)
    if (m.is_used)
      if (int32_t e = check_matrix(m.name, m.matrix)) return e;
  return 0;
}

int32_t check_layer(const fk_layer &l, int64_t hidden_size) {
  if (int32_t e = check_matrices(l, l.mlp.down.codes != nullptr)) return e;
  const fk_attention &a = l.attention;
  int64_t q = a.n_heads * a.head_dim, kv = a.n_kv_heads * a.head_dim;
  if (l.query.n != q || l.key.n != kv || l.value.n != kv || l.query.k != hidden_size || l.key.k != hidden_size ||
      l.value.k != hidden_size || l.output.k != q || l.output.n != hidden_size)
    return reject_argument("layer: query, key, value, output: shapes do not fit %lld and %lld heads of %lld",
                           (long long)a.n_heads, (long long)a.n_kv_heads, (long long)a.head_dim);
  if (!l.input_norm.weight || l.input_norm.width != hidden_size || !l.feed_forward_norm.weight ||
      l.feed_forward_norm.width != hidden_size)
    return reject_argument("layer: input_norm, feed_forward_norm: expected the width %lld", (long long)hidden_size);
  if (l.query_norm.weight && l.query_norm.width != a.head_dim && l.query_norm.width != q)
    return reject_argument("layer.query_norm.width: got %lld, expected a head's or all heads'", (long long)l.query_norm.width);
  if (l.key_norm.weight && l.key_norm.width != a.head_dim && l.key_norm.width != kv)
    return reject_argument("layer.key_norm.width: got %lld, expected a head's or all heads'", (long long)l.key_norm.width);
  if (l.rope != FK_ROPE_NONE && (l.rope_width < 2 || l.rope_width % 2 || l.rope_width > a.head_dim))
    return reject_argument("layer.rope_width: got %lld, expected an even number up to %lld", (long long)l.rope_width,
                           (long long)a.head_dim);
  if (l.mlp.down.codes && (l.mlp.down.n != hidden_size || l.mlp.gate.k != hidden_size || l.mlp.up.k != hidden_size ||
                           l.mlp.gate.n != l.mlp.down.k || l.mlp.up.n != l.mlp.down.k))
    return reject_argument("layer.mlp: gate, up and down: shapes do not fit");
  if (l.moe_layer < 0 && !l.mlp.down.codes) return reject_argument("layer.mlp: got none, expected one without experts");
  if (l.moe_layer >= 0 && (l.gate.weight.k != hidden_size || l.gate.top_k < 1 || l.gate.top_k > l.gate.weight.n))
    return reject_argument("layer.gate: got top_k %lld of %lld experts", (long long)l.gate.top_k, (long long)l.gate.weight.n);
  const fk_gate &g = l.gate;
  if (l.moe_layer >= 0 && g.top_groups < g.n_groups &&
      (g.weight.n % g.n_groups || g.top_groups < 1 || g.scores_per_group < 1 ||
       g.scores_per_group > g.weight.n / g.n_groups || g.top_k > g.weight.n / g.n_groups * g.top_groups))
    return reject_argument("layer.gate: got %d of %d groups and %d scores per group of %lld experts", g.top_groups,
                           g.n_groups, g.scores_per_group, (long long)g.weight.n);
  return 0;
}

int32_t check_head(const fk_head &h, int64_t hidden_size) {
  if (int32_t e = check_matrix("head.weight.", h.weight)) return e;
  if (h.weight.k != hidden_size)
    return reject_argument("head.weight.k: got %lld, expected %lld", (long long)h.weight.k, (long long)hidden_size);
  if (!h.norm.weight || h.norm.width != hidden_size)
    return reject_argument("head.norm: expected the width %lld", (long long)hidden_size);
  return 0;
}

int32_t check_draws(const fk_draw *draws, int64_t n_draws, int64_t rows) {
  if (n_draws < 0 || (n_draws && !draws))
    return reject_argument("draws: got %lld of them or NULL, expected addresses", (long long)n_draws);
  for (int64_t i = 0; i < n_draws; ++i) {
    const fk_draw &d = draws[i];
    if (d.row < 0 || d.row >= rows)
      return reject_argument("draw.row: got %lld, expected 0 to %lld", (long long)d.row, (long long)rows - 1);
    bool is_valid = d.uniform >= 0 && d.uniform < 1 && d.temperature >= 0 && d.top_k >= 0 && d.top_p >= 0 &&
                    d.top_p <= 1 && d.min_p >= 0 && d.min_p <= 1;
    if (!is_valid)
      return reject_argument("draw: got uniform %g, temperature %g, top_k %lld, top_p %g, min_p %g, expected them in "
                             "their ranges", d.uniform, d.temperature, (long long)d.top_k, d.top_p, d.min_p);
  }
  return 0;
}

int32_t check_scores(const fk_head &h, const fk_step &s) {
  if (s.n_scores < 0) return reject_argument("step.n_scores: got %lld, expected 0 or more", (long long)s.n_scores);
  if (s.n_scores && (!h.weight.codes || !s.score_rows || !s.scores || !s.peaks || !s.tokens))
    return reject_argument("step.n_scores: got %lld without a head or places, expected 0", (long long)s.n_scores);
  for (int64_t i = 0; i < s.n_scores; ++i)
    if (s.score_rows[i] < 0 || s.score_rows[i] >= s.rows)
      return reject_argument("step.score_rows: got %d, expected 0 to %lld", s.score_rows[i], (long long)s.rows - 1);
  return check_draws(s.draws, s.n_draws, s.n_scores);
}

constexpr int64_t kSerialScores = 1 << 16;  // below which one thread draws faster

// Draws tokens of rows whose tokens are the highest scores' places.
void draw_tokens(const float *scores, int64_t vocabulary, const fk_draw *draws, int64_t n_draws, const float *peaks,
                 int32_t *tokens, int32_t n_threads) {
  auto draw = [&](int64_t i) {
    int64_t row = draws[i].row;
    if (std::isfinite(peaks[row]))
      tokens[row] = router_ops().draw(scores + row * vocabulary, vocabulary, tokens[row], draws[i]);
  };
  if (n_threads < 2 || n_draws * vocabulary < kSerialScores) {
    for (int64_t i = 0; i < n_draws; ++i) draw(i);
  } else {
    parallel(n_draws, n_threads, draw);
  }
}

void find_highest_scores(const float *scores, int64_t rows, int64_t vocabulary, float *peaks, int32_t *tokens) {
  for (int64_t r = 0; r < rows; ++r)
    router_ops().find_highest(scores + r * vocabulary, vocabulary, peaks + r, tokens + r);
}

}  // namespace
}  // namespace fk

struct fk_program {
  int64_t hidden_size;
  std::vector<fk_layer> layers;
  fk_experts_port port;
  fk_head head;
  fk::Buffers b;
  const fk::RouterOps *ops = nullptr;
  // The layer whose experts are being computed.
  const fk_layer *pending = nullptr;
  int64_t pending_rows = 0;
  int32_t n_threads = 1;
  bool is_local = false;         // whether this process alone computed the last layer's experts
  std::optional<fk::Call> call;  // held while no sandbox needs the cores of this process's workers

  int32_t run(const fk_step &step) {
    struct End {
      std::optional<fk::Call> &call;
      ~End() { call.reset(); }
    } end{call};
    ops = &fk::router_ops();
    n_threads = std::max(1, step.n_threads);
    for (int64_t i = 0; i < step.n_layers; ++i) {
      const fk_layer &layer = layers[step.first_layer + i];
      if (int32_t e = attention(layer, step)) return e;
      if (int32_t e = feed_forward(layer, step)) return e;
    }
    return step.n_scores ? score(step) : 0;
  }

  // The scores of some rows, and the highest of each.
  int32_t score(const fk_step &step) {
    int64_t n = step.n_scores, vocabulary = head.weight.n;
    b.normed.resize(n * hidden_size);
    for (int64_t i = 0; i < n; ++i)
      ops->normalize(head.norm, step.hidden + step.score_rows[i] * hidden_size, hidden_size, 1,
                     b.normed.data() + i * hidden_size, hidden_size);
    const fk_matrix *weight = &head.weight;
    float *scores = step.scores;
    if (int32_t e = ops->multiply(&weight, &scores, 1, b.normed.data(), n, n_threads)) return e;
    if (head.scale != 1.0f)
      for (int64_t i = 0; i < n * vocabulary; ++i) scores[i] *= head.scale;
    fk::find_highest_scores(scores, n, vocabulary, step.peaks, step.tokens);
    fk::draw_tokens(scores, vocabulary, step.draws, step.n_draws, step.peaks, step.tokens, n_threads);
    return 0;
  }

  int32_t attention(const fk_layer &l, const fk_step &step) {
    const fk_attention &a = l.attention;
    int64_t rows = step.rows, q = a.n_heads * a.head_dim, kv = a.n_kv_heads * a.head_dim;
    if (!call) call.emplace(n_threads);
    normalize_hidden(l.input_norm, step);
    if (int32_t e = fk::multiply({{l.query, b.query}, {l.key, b.key}, {l.value, b.value}}, b.normed, rows, n_threads))
      return e;
    normalize_heads(l.query_norm, rows, q, b.query);
    normalize_heads(l.key_norm, rows, kv, b.key);
    if (l.rope != FK_ROPE_NONE) {
      bool is_narrow = l.rope == FK_ROPE_HALVES_NARROW || l.rope == FK_ROPE_PAIRS_NARROW;
      int64_t angles = is_narrow ? l.rope_width / 2 : l.rope_width;
      for (int64_t r = 0; r < rows; ++r) {
        const float *cosines = step.cosines[l.rope_table] + r * angles, *sines = step.sines[l.rope_table] + r * angles;
        fk::rotate(l.rope, cosines, sines, l.rope_width, a.n_heads, a.head_dim, b.query.data() + r * q);
        fk::rotate(l.rope, cosines, sines, l.rope_width, a.n_kv_heads, a.head_dim, b.key.data() + r * kv);
      }
    }
    b.attended.resize(rows * q);
    ops->attend(a, step.groups[l.attention_group], b.query.data(), q, b.key.data(), kv, b.value.data(), kv,
                b.attended.data(), n_threads);
    if (int32_t e = fk::multiply({{l.output, b.added}}, b.attended, rows, n_threads)) return e;
    ops->add_scaled(b.added.data(), l.residual_scale, rows * hidden_size, step.hidden);
    return 0;
  }

  int32_t feed_forward(const fk_layer &l, const fk_step &step) {
    normalize_hidden(l.feed_forward_norm, step);
    int64_t count = step.rows * hidden_size;
    pending = l.mlp.down.codes ? &l : nullptr;
    pending_rows = step.rows;
    if (l.moe_layer >= 0) {
      int32_t status = experts(l, step);
      if (status) {
        pending = nullptr;
        return status;
      }
    }
    if (int32_t e = overlap()) return e;
    if (l.mlp.down.codes) {
      if (l.moe_layer >= 0) ops->add_scaled(b.experts.data(), 1.0f, count, b.shared.data());
      ops->add_scaled(b.shared.data(), l.residual_scale, count, step.hidden);
    } else {
      ops->add_scaled(b.experts.data(), l.residual_scale, count, step.hidden);
    }
    return 0;
  }

  int32_t experts(const fk_layer &l, const fk_step &step) {
    int64_t rows = step.rows, k = l.gate.top_k;
    if (int32_t e = fk::multiply({{l.gate.weight, b.logits}}, b.normed, rows, n_threads)) return e;
    b.index.resize(rows * k);
    b.weight.resize(rows * k);
    for (int64_t r = 0; r < rows; ++r)
      fk::choose_experts(l.gate, b.logits.data() + r * l.gate.weight.n, b.index.data() + r * k, b.weight.data() + r * k,
                         b.factors);
    b.experts.resize(rows * hidden_size);
    int32_t status = 1;
    if (!is_local) call.reset();  // as in the layer before
    if (port.begin && port.finish) {
      status = port.begin(port.context, l.moe_layer, rows, hidden_size, k, b.normed.data(), b.index.data(), b.weight.data());
      is_local = status == fk::kBegunHere;
      if (!is_local) call.reset();
      if (!status || is_local) {
        if (int32_t e = overlap()) return e;
        status = port.finish(port.context, l.moe_layer, b.experts.data());
      }
    }
    if (status == 1) {
      is_local = false;
      call.reset();
      status = port.compute(port.compute_context, l.moe_layer, rows, hidden_size, k, b.normed.data(), b.index.data(),
                            b.weight.data(), b.experts.data());
    }
    return status;
  }

  // b.shared = the dense or shared MLP of the pending layer for b.normed.
  int32_t overlap() {
    const fk_layer *l = pending;
    if (!l) return 0;
    pending = nullptr;
    int64_t rows = pending_rows;
    fk::Call call(n_threads);
    if (int32_t e = fk::multiply({{l->mlp.gate, b.gates}, {l->mlp.up, b.ups}}, b.normed, rows, n_threads)) return e;
    ops->gate(l->mlp.activation, b.gates.data(), b.ups.data(), rows * l->mlp.gate.n, b.gates.data());
    if (int32_t e = fk::multiply({{l->mlp.down, b.shared}}, b.gates, rows, n_threads)) return e;
    if (!l->mlp_gate.codes) return 0;
    if (int32_t e = fk::multiply({{l->mlp_gate, b.factors}}, b.normed, rows, n_threads)) return e;
    for (int64_t r = 0; r < rows; ++r) {
      float factor = 1.0f / (1.0f + std::exp(-b.factors[r])), *row = b.shared.data() + r * hidden_size;
      for (int64_t i = 0; i < hidden_size; ++i) row[i] *= factor;
    }
    return 0;
  }

  void normalize_hidden(const fk_norm &norm, const fk_step &step) {
    b.normed.resize(step.rows * hidden_size);
    ops->normalize(norm, step.hidden, hidden_size, step.rows, b.normed.data(), hidden_size);
  }

  void normalize_heads(const fk_norm &norm, int64_t rows, int64_t width, std::vector<float> &x) {
    if (norm.weight) ops->normalize(norm, x.data(), norm.width, rows * width / norm.width, x.data(), norm.width);
  }
};

#define FK_EXPORT __attribute__((visibility("default")))

extern "C" {

FK_EXPORT fk_program *fk_program_create(int64_t hidden_size, int64_t n_layers, const fk_layer *layers,
                                        const fk_experts_port *port, const fk_head *head) {
  if (hidden_size < 1 || n_layers < 1 || !layers || !port || !port->compute) {
    fk::reject_argument("program: got no layers, port or compute, expected at least one layer");
    return nullptr;
  }
  for (int64_t i = 0; i < n_layers; ++i)
    if (fk::check_layer(layers[i], hidden_size)) return nullptr;
  if (head && fk::check_head(*head, hidden_size)) return nullptr;
  try {
    return new fk_program{hidden_size, std::vector<fk_layer>(layers, layers + n_layers), *port,
                          head ? *head : fk_head{}, {}};
  } catch (const std::bad_alloc &) {
    fk::reject_argument("program: out of memory");
    return nullptr;
  }
}

FK_EXPORT void fk_program_free(fk_program *program) { delete program; }

FK_EXPORT int32_t fk_program_run(fk_program *program, const fk_step *step) {
  if (!program || !step || !step->hidden || step->rows < 1)
    return fk::reject_argument("step: got no program, hidden states or rows, expected at least one row");
  if (step->first_layer < 0 || step->n_layers < 0 ||
      step->first_layer + step->n_layers > int64_t(program->layers.size()))
    return fk::reject_argument("step.n_layers: got layers %lld to %lld, expected up to %lld", (long long)step->first_layer,
                               (long long)(step->first_layer + step->n_layers), (long long)program->layers.size());
  if (int32_t e = fk::check_scores(program->head, *step)) return e;
  for (int64_t i = 0; i < step->n_layers; ++i) {
    const fk_layer &l = program->layers[step->first_layer + i];
    if (l.attention_group < 0 || l.attention_group >= step->n_groups)
      return fk::reject_argument("step.n_groups: got %lld, expected more than %lld", (long long)step->n_groups,
                                 (long long)l.attention_group);
    if (l.rope != FK_ROPE_NONE && (l.rope_table < 0 || l.rope_table >= step->n_rope_tables))
      return fk::reject_argument("step.n_rope_tables: got %lld, expected more than %lld", (long long)step->n_rope_tables,
                                 (long long)l.rope_table);
    bool is_checked = i > 0 && l.attention_group == program->layers[step->first_layer + i - 1].attention_group &&
                      l.attention.n_slots >= program->layers[step->first_layer].attention.n_slots;
    if (!is_checked)
      if (int32_t e = fk::check_batch(l.attention, step->groups[l.attention_group], step->rows)) return e;
  }
  try {
    return program->run(*step);
  } catch (const std::bad_alloc &) {
    return FK_E_MEMORY;
  }
}

FK_EXPORT int32_t fk_highest_scores(const float *scores, int64_t rows, int64_t vocabulary, float *peaks,
                                    int32_t *tokens) {
  if (!scores || !peaks || !tokens || rows < 0 || vocabulary < 1 || vocabulary > INT32_MAX)
    return fk::reject_argument("scores: got %lld rows of %lld, expected addresses and at least one score",
                               (long long)rows, (long long)vocabulary);
  fk::find_highest_scores(scores, rows, vocabulary, peaks, tokens);
  return 0;
}

FK_EXPORT int32_t fk_draw_tokens(const float *scores, int64_t rows, int64_t vocabulary, const fk_draw *draws,
                                 int64_t n_draws, int32_t *tokens, int32_t n_threads) {
  if (!scores || !tokens || rows < 0 || vocabulary < 1 || vocabulary > INT32_MAX)
    return fk::reject_argument("scores: got %lld rows of %lld, expected addresses and at least one score",
                               (long long)rows, (long long)vocabulary);
  if (int32_t e = fk::check_draws(draws, n_draws, rows)) return e;
  try {
    std::vector<float> peaks(rows);
    for (int64_t i = 0; i < n_draws; ++i) {
      int64_t row = draws[i].row;
      fk::find_highest_scores(scores + row * vocabulary, 1, vocabulary, peaks.data() + row, tokens + row);
    }
    fk::draw_tokens(scores, vocabulary, draws, n_draws, peaks.data(), tokens, n_threads);
  } catch (const std::bad_alloc &) {
    return FK_E_MEMORY;
  }
  return 0;
}

FK_EXPORT int32_t fk_program_overlap(fk_program *program) { return program->overlap(); }

}  // extern "C"
