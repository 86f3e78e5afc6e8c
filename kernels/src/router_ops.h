// C interface of what a router's step needs beside linear layers: attention over a paged KV cache,
// and a program of decoder layers that runs as one call. Activations are float32.
#ifndef FAASMOE_ROUTER_OPS_H
#define FAASMOE_ROUTER_OPS_H

#include "faasmoe_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// Attention of one layer. A slot of the cache holds one token: n_kv_heads * head_dim elements.
typedef struct fk_attention {
  int64_t n_heads;     // query heads, a multiple of n_kv_heads
  int64_t n_kv_heads;
  int64_t head_dim;
  int64_t window;      // keys that a query sees, its own included; 0: all
  int64_t n_slots;     // of k_cache and v_cache
  void *k_cache, *v_cache;
  const float *sinks;  // logit per query head that takes part in the softmax without a value, or NULL
  int32_t cache_dtype; // enum fk_dtype
  float scaling;       // of scores
  float softcap;       // scores become softcap * tanh(score / softcap); 0: none
} fk_attention;

// The requests of a batch, by the offsets of their query and key rows. The last keys of a request are
// its new tokens; those before lie in the cache.
typedef struct fk_attention_batch {
  int64_t n_requests;
  const int32_t *query_offsets;  // [n_requests + 1], from 0
  const int32_t *key_offsets;    // [n_requests + 1], from 0
  const int64_t *read_index;     // slot of each key; those of new tokens are not used. NULL: no cached keys
  const int64_t *write_index;    // slot of each new token
} fk_attention_batch;

// out[rows, n_heads * head_dim] of queries[rows, n_heads * head_dim] over cached and new keys, causal.
// Afterwards the new keys and values [rows, n_kv_heads * head_dim] are written to the cache. Strides
// are in elements, heads are contiguous.
int32_t fk_paged_attention(const fk_attention *attention, const fk_attention_batch *batch,
                           const float *queries, int64_t query_stride, const float *keys,
                           int64_t key_stride, const float *values, int64_t value_stride, float *out,
                           int32_t n_threads);

typedef struct fk_norm {  // x * weight / sqrt(mean(x^2) + epsilon)
  const float *weight;    // NULL: no norm
  int64_t width;          // of a row: the hidden size, a head, or all heads
  float epsilon;
} fk_norm;

enum fk_rope {  // how an angle's cosine and sine rotate the first elements of a head
  FK_ROPE_NONE = 0,
  FK_ROPE_HALVES = 1,         // (i, i + width / 2), angles [width] with two equal halves
  FK_ROPE_HALVES_NARROW = 2,  // the same, angles [width / 2]
  FK_ROPE_PAIRS = 3,          // (2i, 2i + 1), angles [width], equal in pairs
  FK_ROPE_PAIRS_NARROW = 4,   // the same, angles [width / 2]
};

enum fk_scoring {
  FK_SCORE_SOFTMAX = 0,        // of all logits, then the top k
  FK_SCORE_SIGMOID = 1,        // of each logit, then the top k
  FK_SCORE_TOP_K_SOFTMAX = 2,  // the top k logits, then their softmax
};

typedef struct fk_gate {  // chooses the experts of a row
  fk_matrix weight;       // [n_experts, hidden]
  const float *selection_bias;  // [n_experts], added to scores for selection only, or NULL
  int64_t top_k;
  int32_t scoring;        // enum fk_scoring
  int32_t is_normalized;  // whether the k weights are divided by their sum
  float scale;            // of the weights
  float epsilon;          // added to the sum
  int32_t n_groups;       // groups of consecutive experts; with fewer of them to choose from, those
  int32_t top_groups;     // whose best `scores_per_group` scores have the largest sums
  int32_t scores_per_group;
} fk_gate;

// A gated MLP: down(act(gate(x)) * up(x)); codes of down NULL: none.
typedef struct fk_mlp {
  fk_matrix gate, up, down;
  int32_t activation;  // enum fk_activation
} fk_mlp;

// x += o(attention(norm(x))) * residual_scale; x += feed_forward(norm(x)) * residual_scale
typedef struct fk_layer {
  fk_norm input_norm, query_norm, key_norm, feed_forward_norm;
  fk_matrix query, key, value, output;
  fk_attention attention;
  int64_t attention_group;  // index of its batch in fk_step
  int64_t rope_table;       // index of its angles in fk_step
  int64_t rope_width;       // elements of a head that are rotated
  int32_t rope;             // enum fk_rope
  float residual_scale;
  int64_t moe_layer;        // index of the MoE layer; -1: the feed-forward is `mlp` alone
  fk_gate gate;
  fk_mlp mlp;               // the feed-forward, or the shared expert, which may be missing
  fk_matrix mlp_gate;       // [1, hidden]: its sigmoid scales the shared expert; codes NULL: none
} fk_layer;

// Computes the routed experts of a layer. `begin` starts and `finish` writes out[rows, hidden], each
// row's weighted sum. Both return 0, a negative value for an error, or 1 where the general path has to
// be taken: `compute`, which does everything and may call fk_program_overlap meanwhile. `begin` returns
// 2 instead of 0 where no other process computes meanwhile: then this one's workers need not make room.
// `begin` and `finish` may be NULL; `compute` returns 0, or a negative value for an error.
typedef struct fk_experts_port {
  void *context;
  int32_t (*begin)(void *context, int64_t layer, int64_t rows, int64_t hidden_size, int64_t top_k,
                   const float *hidden, const int64_t *top_k_index, const float *top_k_weight);
  int32_t (*finish)(void *context, int64_t layer, float *out);
  void *compute_context;
  int32_t (*compute)(void *context, int64_t layer, int64_t rows, int64_t hidden_size, int64_t top_k,
                     const float *hidden, const int64_t *top_k_index, const float *top_k_weight,
                     float *out);
} fk_experts_port;

// The last norm and the LM head: scores are head(norm(x)) * scale.
typedef struct fk_head {
  fk_norm norm;
  fk_matrix weight;  // [vocabulary, hidden]; codes NULL: none
  float scale;
} fk_head;

// A token that is drawn from a row of scores, as softmax(scores / temperature) tells.
typedef struct fk_draw {
  int64_t row;        // of the scores
  int64_t top_k;      // keeps this many most likely tokens; 0: all
  double top_p;       // keeps the most likely tokens up to this cumulative probability
  double min_p;       // keeps tokens with at least this fraction of the highest probability
  double uniform;     // the random number, from 0, less than 1
  float temperature;  // 0 or more; the least positive number instead of 0
} fk_draw;

typedef struct fk_step {
  int64_t rows;
  float *hidden;                      // [rows, hidden_size], modified in place
  int64_t n_groups;
  const fk_attention_batch *groups;
  int64_t n_rope_tables;
  const float *const *cosines, *const *sines;  // per table [rows, angles of the layer's kind]
  int64_t first_layer, n_layers;      // the layers to run
  int64_t n_scores;                   // rows whose scores are wanted, after the layers
  const int32_t *score_rows;          // [n_scores]
  float *scores;                      // [n_scores, vocabulary]
  float *peaks;                       // [n_scores], see fk_highest_scores
  int32_t *tokens;                    // [n_scores]
  int64_t n_draws;                    // rows of scores whose token is drawn; of others it is the highest's
  const fk_draw *draws;               // [n_draws]
  int32_t n_threads;
} fk_step;

typedef struct fk_program fk_program;

// A program over `layers`, which are copied; what they point to is not. `head` may be NULL. NULL: see
// fk_last_error.
fk_program *fk_program_create(int64_t hidden_size, int64_t n_layers, const fk_layer *layers,
                              const fk_experts_port *port, const fk_head *head);
void fk_program_free(fk_program *program);

// Runs layers on a batch; one call at a time. 0, an FK_E_* code, or what the port returned as error.
int32_t fk_program_run(fk_program *program, const fk_step *step);

// Of each of `rows` rows of `scores` [rows, vocabulary] the highest score, NaN if one is, and its first
// index.
int32_t fk_highest_scores(const float *scores, int64_t rows, int64_t vocabulary, float *peaks, int32_t *tokens);

// Writes tokens[row] of each draw from scores [rows, vocabulary]; of a row whose highest score is not
// finite its place.
int32_t fk_draw_tokens(const float *scores, int64_t rows, int64_t vocabulary, const fk_draw *draws, int64_t n_draws,
                       int32_t *tokens, int32_t n_threads);

// Computes the shared expert of the layer whose experts are being computed, unless it was. To be
// called from within `compute`.
int32_t fk_program_overlap(fk_program *program);

#ifdef __cplusplus
}  // extern "C"

namespace fk {

// What of this depends on the instruction set.
struct RouterOps {
  void (*attend)(const fk_attention &, const fk_attention_batch &, const float *queries, int64_t query_stride,
                 const float *keys, int64_t key_stride, const float *values, int64_t value_stride,
                 float *out, int32_t n_threads);
  void (*normalize)(const fk_norm &, const float *from, int64_t stride, int64_t rows, float *to, int64_t to_stride);
  void (*gate)(int32_t activation, const float *gate, const float *up, int64_t count, float *to);
  void (*add_scaled)(const float *from, float scale, int64_t count, float *to);
  // out[p][rows, w[p]->n] = x[rows, k] times each of up to three matrices [n, k]; FK_E_MEMORY or 0.
  int32_t (*multiply)(const fk_matrix *const *w, float *const *out, int64_t count, const float *x, int64_t rows,
                      int32_t n_threads);
  // The highest of `count` scores, NaN if one is, and its first index.
  void (*find_highest)(const float *scores, int64_t count, float *peak, int32_t *index);
  // The token of a draw from `count` scores, whose highest is finite and at `highest`.
  int32_t (*draw)(const float *scores, int64_t count, int32_t highest, const fk_draw &);
};

const RouterOps &router_ops();            // of the instruction set in use
int32_t check_matrix(const char *owner, const fk_matrix &m);  // a message starts with the owner, such as "w."
int32_t reject_argument(const char *format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace fk

extern const fk::RouterOps fk_router_ops_portable;
#if defined(FK_WITH_X86)
extern const fk::RouterOps fk_router_ops_avx2, fk_router_ops_avx512, fk_router_ops_avx512_bf16;
#endif
#if defined(FK_WITH_NEON)
extern const fk::RouterOps fk_router_ops_neon;
#endif
#endif
#endif
