// C interface of the FaaSMoE kernel library.
//
// Linear layers and feed-forward experts over weights as they lie in a store: nothing is
// repacked or copied. Weights are row-major [n, k]; k is contiguous. Results are within 1e-4 of those
// of the dequantised weights in float32, before they are rounded once to the output's type: sums are
// float32, and inputs keep at least 16 bits of their mantissa or, for integer weights, of the largest
// of 128 columns. A row's bits do not depend on the other rows of the call.
//
// Functions return 0, or a negative FK_E_* code and leave the output unspecified; fk_last_error says
// what was wrong. Calls may come from any thread.
#ifndef FAASMOE_KERNELS_H
#define FAASMOE_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a structure or the meaning of an argument changes.
#define FK_ABI_VERSION 8

enum fk_dtype { FK_FLOAT32 = 0, FK_BFLOAT16 = 1, FK_FLOAT16 = 2 };

enum fk_scheme {
  FK_W_FLOAT32 = 0,
  FK_W_BFLOAT16 = 1,
  FK_W_FLOAT16 = 2,
  FK_W_INT8 = 3,   // codes int8 [n, k]; value = code, or code + 128 - zero
  FK_W_INT4 = 4,   // codes uint8 [n, k / 2], low nibble = even column; value = code - 8, or code - zero
  FK_W_MXFP4 = 5,  // codes uint8 [n, k / 2] of E2M1, low nibble = even column; a scale per 32
  FK_W_FP8 = 6,    // codes uint8 [n, k] of E4M3 without NaN; a scale per row, or per group_rows x group
  FK_W_NVFP4 = 7,  // codes as FK_W_MXFP4; an E4M3 scale per 16 columns, times a float32 factor
};

// Types of scales, zero points and biases, as they lie in a store.
enum fk_parameter_dtype {
  FK_P_FLOAT32 = 0,
  FK_P_BFLOAT16 = 1,
  FK_P_FLOAT16 = 2,
  FK_P_E8M0 = 3,   // uint8, 2^(code - 127), 255 is NaN; scales only
  FK_P_UINT8 = 4,  // zero points only
  FK_P_E4M3 = 5,   // uint8; scales of FK_W_NVFP4 only
};

enum fk_activation {
  FK_SILU = 0,
  FK_GELU = 1,       // exact, with erf
  FK_GELU_TANH = 2,  // tanh approximation
  FK_RELU = 3,
  FK_RELU2 = 4,      // relu(x)^2
  FK_SIGMOID = 5,
  FK_CLAMPED_SWIGLU = 6,  // GPT-OSS: (up + 1) * gate * sigmoid(alpha * gate), clamped at limit
};

enum fk_error {
  FK_E_ARGUMENT = -1,  // a size, scheme, dtype or pointer that cannot be used
  FK_E_MEMORY = -2,    // scratch memory could not be allocated
};

// A weight matrix [n, k].
typedef struct fk_matrix {
  int32_t scheme;       // enum fk_scheme
  int32_t group;        // columns per scale; 0: one scale per row. Must be a multiple of 32 that divides k
                        // (FK_W_FP8: the last group may have fewer columns; FK_W_NVFP4: 16)
  int64_t n;            // output features
  int64_t k;            // input features
  const void *codes;    // [n, k] in the scheme's type
  const void *scales;   // [n, k / group], or [n]; NULL for float schemes; see group_rows
  const void *zeros;    // FK_W_INT8 (around 128), FK_W_INT4 (around 8): shape of scales; NULL: symmetric
  const void *bias;     // [n], or NULL
  int32_t scale_dtype;  // enum fk_parameter_dtype: float32, bfloat16, float16 or E8M0; E4M3 of FK_W_NVFP4
  int32_t zero_dtype;   // float32, bfloat16, float16 or uint8
  int32_t bias_dtype;   // float32, bfloat16 or float16
  int32_t group_rows;   // FK_W_FP8 only: rows that share their scales, the last ones perhaps fewer; 0 and 1: none
  const void *codes_upper;   // rows n/2 and above, if they lie elsewhere; NULL: all rows follow each other
  const void *scales_upper;  // scales of rows n/2 and above, which begin a group of rows there; NULL: all follow
                             // each other; only without zeros
  const void *factors;       // FK_W_NVFP4: one float32 that multiplies the scales; NULL: 1
  const void *factors_upper; // the same for rows n/2 and above; NULL: that of the rows below
} fk_matrix;

typedef struct fk_gating {
  int32_t activation;   // enum fk_activation
  int32_t is_gated;     // 1: hidden = act(gate) * up; 0: hidden = act(up), no gate
  int32_t interleaved;  // 1: rows of gate_up alternate gate, up (GPT-OSS); 0: gate rows, then up rows
  float alpha;          // FK_CLAMPED_SWIGLU only
  float limit;          // FK_CLAMPED_SWIGLU only
} fk_gating;

int32_t fk_abi_version(void);

// What was wrong with the last failed call of this thread, such as "w.group: got 48, expected 0 or ...".
const char *fk_last_error(void);

// Name of the instruction set in use: "avx512_bf16", "avx512", "avx2", "neon" or "portable".
const char *fk_isa(void);

// Use another instruction set, for tests; FK_E_ARGUMENT if this CPU or build lacks it.
int32_t fk_set_isa(const char *name);

// out[rows, n] = x[rows, k] @ w^T (+ bias). `x_stride` and `out_stride` are in elements.
int32_t fk_linear(const fk_matrix *w, const void *x, int32_t x_dtype, int64_t x_stride, int64_t rows,
                  void *out, int32_t out_dtype, int64_t out_stride, int32_t n_threads);

// Pairs of input row and expert, sorted by expert. All arrays but `group_sizes` have one entry per
// pair; `n_groups` experts have pairs.
typedef struct fk_pairs {
  int64_t n_groups;
  const int64_t *group_sizes;  // pairs of each group
  const int64_t *rows;         // input row of each pair
  const int64_t *positions;    // output row of each pair; NULL in reduced mode: its input row
  const float *weights;        // routing weight of each pair
  int64_t n_out;               // output rows in reduced mode with positions; else not read
} fk_pairs;

enum fk_reduction { FK_UNREDUCED = 0, FK_REDUCED = 1, FK_ADDED = 2 };

// The experts of a block, one matrix of `first` and `down` per group of pairs: `first[g]` is the
// gate-up (or up) projection [2i or i, h] of the group's expert, `down[g]` its down projection [h, i].
//
// Reduced: out[rows, h], or out[n_out, h] with positions, is the sum of the pairs of each output row,
// weighted, in float32, in the order of the groups, rounded once. Added: the same, added to what `out`
// holds, float32 with rows that follow each other; groups that are computed in several calls have the
// bits of one call. Unreduced: out[positions, h] is each pair's weighted output.
int32_t fk_experts(const fk_matrix *first, const fk_matrix *down, const fk_gating *gating,
                   const fk_pairs *pairs, const void *x, int32_t x_dtype, int64_t x_stride,
                   int64_t rows, int32_t reduction, void *out, int32_t out_dtype,
                   int64_t out_stride, int32_t n_threads);

// Guards of mapped files, see sigbus_guard.cpp. A slot is what fk_guard_add returns.

// Guards [address, address + size), the mapping of a file from `file_offset` on. Returns a slot, or -1
// if there is none.
int32_t fk_guard_add(void *address, int64_t size, int64_t file_offset);
// Returns where it is written, as 1, that the range was damaged since it was added or restored.
int32_t *fk_guard_damaged(int32_t slot);
// Maps the file again over the range. Returns 0, or errno and leaves the range damaged.
int32_t fk_guard_restore(int32_t slot, int32_t descriptor);
// Ends a guard; call it before the range is unmapped.
void fk_guard_remove(int32_t slot);

#ifdef __cplusplus
}
#endif
#endif
