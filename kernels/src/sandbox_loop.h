// The sandbox's side of mailboxes: computes request frames of attached functions without Python.
//
// Python publishes functions, opens and closes mailboxes and reads counters. Each mailbox has a
// thread that waits for its router; one frame is computed at a time, with all of the sandbox's
// threads. What is not ordinary is answered with a status, and the router uses HTTP.
#ifndef FAASMOE_SANDBOX_LOOP_H
#define FAASMOE_SANDBOX_LOOP_H

#include <stdint.h>

#include "function_weights.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fk_sandbox fk_sandbox;

#define FK_N_SECONDS_BUCKETS 12
#define FK_N_STATUSES 8

typedef struct fk_sandbox_counters {
  int64_t frames, rows;
  int64_t statuses[FK_N_STATUSES];                // answers by enum SlotStatus
  int64_t seconds_buckets[FK_N_SECONDS_BUCKETS];  // computations by time, see fk_sandbox_new; not cumulative
  double seconds_sum;
  int64_t n_running;                              // frames being computed or waiting for their turn
  int64_t n_mailboxes;
} fk_sandbox_counters;

// `buckets_s`: ascending upper bounds of FK_N_SECONDS_BUCKETS - 1 buckets of compute times.
fk_sandbox *fk_sandbox_new(int32_t n_threads, const double *buckets_s);
// Closes all mailboxes.
void fk_sandbox_free(fk_sandbox *sandbox);

// Makes a function available, in place of an earlier one of this id. < 0: fk_calls_error.
int32_t fk_sandbox_publish(fk_sandbox *sandbox, const char *id, const fk_function_layer *layers,
                           int64_t n_layers);
// Returns once no call computes with the function any more; also if there is none.
void fk_sandbox_retract(fk_sandbox *sandbox, const char *id);
// Frames computed with a function since it was published; 0 if there is none.
int64_t fk_sandbox_function_frames(fk_sandbox *sandbox, const char *id);

// Maps the mailbox in the memory of `fd`, which may be closed afterwards, and serves it. Returns a
// handle, or < 0: fk_calls_error.
int64_t fk_sandbox_open(fk_sandbox *sandbox, int32_t fd, int64_t size_bytes);
// Stops serving after the current frame; the handle is then unknown. Returns the frames served.
int64_t fk_sandbox_close(fk_sandbox *sandbox, int64_t mailbox);
// Frames answered on a mailbox so far; -1 if it is unknown.
int64_t fk_sandbox_mailbox_frames(fk_sandbox *sandbox, int64_t mailbox);
// Answers all further frames with kSandboxDraining.
void fk_sandbox_drain(fk_sandbox *sandbox);

void fk_sandbox_read_counters(fk_sandbox *sandbox, fk_sandbox_counters *out);

// What was wrong with the last failed call of this thread to this interface or fk_calls_*.
const char *fk_calls_error(void);

#ifdef __cplusplus
}

namespace fk {
// Records the message of fk_calls_error; returns -1.
int32_t set_calls_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
}  // namespace fk
#endif
#endif
