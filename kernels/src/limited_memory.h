// Experts whose mapped weights do not all fit into memory: what a call needs is read ahead of its products,
// and what is used rarely leaves the page cache at once, in place of what is used often.
//
// The kernel would read each page when it is touched, together with the neighbours, and drop whatever was
// not used for longest, which a prompt that uses all experts makes the same as dropping everything.
#ifndef FAASMOE_LIMITED_MEMORY_H
#define FAASMOE_LIMITED_MEMORY_H

#include <stdint.h>

#include "faasmoe_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

// fk_experts with FK_REDUCED into float32 rows that follow each other, with the same bits, of experts of
// one layer. While this process reads from the disk, they are handled as above. It looks whether it does
// ten times a second at most, so that a call costs no system call while all is in memory.
int32_t fk_layer_experts(int64_t layer, const fk_matrix *first, const fk_matrix *down, const fk_gating *gating,
                         const fk_pairs *pairs, const void *x, int32_t x_dtype, int64_t hidden_size, int64_t rows,
                         float *out, int32_t n_threads);

// The policy by itself, see expert_residency.h. `uses` are three numbers for each expert of a call: its
// name, its layer's and its bytes. `is_read` and `is_dropped` have a byte for each; `evicted` has room for
// `max_evicted` names, of which the functions return how many there are.
typedef struct fk_residency fk_residency;
fk_residency *fk_residency_new(void);
void fk_residency_free(fk_residency *residency);
int64_t fk_residency_begin(fk_residency *residency, double now_s, const int64_t *uses, int64_t n_uses,
                           uint8_t *is_read, uint8_t *is_dropped, int64_t *evicted, int64_t max_evicted);
int64_t fk_residency_finish(fk_residency *residency, double now_s, int64_t missed_bytes, int64_t *evicted,
                            int64_t max_evicted);
// The bytes that may stay, INT64_MAX if all, and those that do.
int64_t fk_residency_capacity(const fk_residency *residency);
int64_t fk_residency_kept(const fk_residency *residency);

#ifdef __cplusplus
}
#endif
#endif
