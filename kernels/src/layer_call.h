// The router's side: computes one MoE layer through mailboxes of sandboxes and local functions.
//
// `fk_calls_begin` groups the rows by function and leaves one frame per sandbox in its mailbox;
// `fk_calls_finish` computes local functions, waits, verifies and adds. What a sandbox does not answer in
// time is sent to other replicas, once, while the others' answers are kept. Whatever is not ordinary makes
// either return FK_CALLS_GENERAL: the caller then computes the whole layer over the general path,
// which has retries, hedges and activation. Which function is reached how, and after which time an
// answer is late, is decided elsewhere and published as tables; what happened is read in bulk.
//
// begin and finish belong to one thread. Everything else may be called from any thread.
#ifndef FAASMOE_LAYER_CALL_H
#define FAASMOE_LAYER_CALL_H

#include <stdint.h>

#include "function_weights.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct fk_calls fk_calls;

enum fk_calls_result { FK_CALLS_DONE = 0, FK_CALLS_GENERAL = 1, FK_CALLS_LOCAL = 2, FK_CALLS_ERROR = -1 };

#define FK_MAX_REPLICAS 8
#define FK_N_SIZE_CLASSES 16

// How one function of a layer is reached. None of mailboxes and local: not natively.
typedef struct fk_route {
  int64_t function;                    // index of its totals, see fk_calls_read_totals
  int64_t local;                       // handle of fk_calls_add_local, or 0
  int64_t n_mailboxes;                 // replicas that may be called now
  int64_t mailboxes[FK_MAX_REPLICAS];  // handles of fk_calls_add_mailbox
  char id[64];                         // padded with zeros
} fk_route;

typedef struct fk_layer_routes {
  const int32_t *function_of;  // position in `routes` of each expert's function, [n_experts]
  int64_t n_experts;
  const fk_route *routes;
  int64_t n_routes;
} fk_layer_routes;

typedef struct fk_calls_settings {
  int32_t store_dtype;      // of frames, enum fk_dtype
  int32_t max_rows;         // larger batches take the general path
  int32_t max_rows_per_expert;  // as do batches with more rows of one expert; 0: any number
  int32_t n_threads;        // of local functions while no call is in flight on this machine
  double call_timeout_s;    // after which an answer is late in any case
  // After how many seconds an answer is late, by the bit length of its rows: with another replica to
  // try, and without.
  double hedge_s[FK_N_SIZE_CLASSES], abandon_s[FK_N_SIZE_CLASSES];
} fk_calls_settings;

// How a call ended.
enum fk_call_end {
  FK_CALL_OK = 0,
  FK_CALL_LATE = 1,       // no answer in time
  FK_CALL_DEAD = 2,       // the sandbox closed the mailbox's connection
  FK_CALL_BROKEN = 3,     // the answer failed verification, or the mailbox holds impossible values
  FK_CALL_DECLINED = 4,   // the sandbox answered with a status; see `status`
  FK_CALL_STOPPED = 5,    // the sandbox's process is stopped (SIGSTOP, a debugger)
};

typedef struct fk_call_event {
  int64_t mailbox;
  double elapsed_s;
  int32_t layer;
  int32_t rows;         // 0: no call; the sandbox closed a mailbox that was not in use
  int32_t end;      // enum fk_call_end
  int32_t status;   // enum SlotStatus of mailbox.h
  char detail[32];
} fk_call_event;

// Totals of one function; the integral of its calls in flight at time t is offset_s + n_in_flight * t.
typedef struct fk_function_totals {
  double offset_s;
  int64_t n_in_flight, calls, rows;
} fk_function_totals;

// What was left since the last time by layers that have ended.
typedef struct fk_calls_left {
  int64_t layers;   // total of native layers
  double layers_s;  // and their time
  int64_t events;   // that wait for fk_calls_take_events
  int64_t faults;   // those of them that are no FK_CALL_OK
} fk_calls_left;

// Totals since fk_calls_new.
typedef struct fk_calls_totals {
  int64_t layers, calls, local_calls, general_layers;
  int64_t sent_bytes, received_bytes;
  double layers_s;  // time from begin to the end of finish
} fk_calls_totals;

fk_calls *fk_calls_new(void);
void fk_calls_free(fk_calls *calls);

// Writes a mailbox into the memory of `fd`, which both it and `socket_fd` may be closed afterwards.
// `socket_fd` is the connection over which the sandbox accepted it: its end is the sandbox's.
// Returns a handle, or < 0: fk_calls_error.
int64_t fk_calls_add_mailbox(fk_calls *calls, int32_t fd, int64_t size_bytes, int32_t n_slots,
                             int32_t request_bytes, int32_t response_bytes, int32_t socket_fd);
int32_t fk_calls_remove_mailbox(fk_calls *calls, int64_t mailbox);
// Bytes of memory that such a mailbox needs.
int64_t fk_mailbox_size(int32_t n_slots, int32_t request_bytes, int32_t response_bytes);

// A function that is computed in this process. Returns a handle, or < 0: fk_calls_error.
int64_t fk_calls_add_local(fk_calls *calls, const fk_function_layer *layers, int64_t n_layers);
// Returns once no layer computes with it any more.
int32_t fk_calls_remove_local(fk_calls *calls, int64_t local);

// Replaces all routes; arguments are copied. < 0: fk_calls_error.
int32_t fk_calls_publish(fk_calls *calls, int64_t version, const fk_layer_routes *layers, int64_t n_layers);
void fk_calls_configure(fk_calls *calls, const fk_calls_settings *settings);

// hidden [rows, hidden_size] in `dtype` (enum fk_dtype), contiguous, unchanged until the layer is finished;
// top_k_index [rows, top_k], others than the layer's experts are skipped; top_k_weight [rows, top_k].
int32_t fk_calls_begin_dtype(fk_calls *calls, int64_t layer, int64_t rows, int64_t hidden_size, int64_t top_k,
                             const void *hidden, int32_t dtype, const int64_t *top_k_index,
                             const float *top_k_weight);
// out [rows, hidden_size] in `dtype`.
int32_t fk_calls_finish_dtype(fk_calls *calls, int64_t layer, void *out, int32_t dtype);

// The same in float32, for programs that call through pointers.
// `fk_calls_begin` also computes the functions of this process: they keep one core busy, as sandboxes
// do, and what the caller does before `fk_calls_finish` can be divided. FK_CALLS_LOCAL: they are all
// that the layer has, and used all threads.
int32_t fk_calls_begin(void *calls, int64_t layer, int64_t rows, int64_t hidden_size, int64_t top_k,
                       const float *hidden, const int64_t *top_k_index, const float *top_k_weight);
int32_t fk_calls_finish(void *calls, int64_t layer, float *out);

// Frees the memory that mailboxes keep for their next calls, unless a layer is between begin and finish.
void fk_calls_release_memory(fk_calls *calls);

// Calls to sandboxes that `begin` made and `finish` has not ended.
int32_t fk_calls_n_in_flight(fk_calls *calls);

// Tells whether there is anything to take, at the cost of one lock.
void fk_calls_read_left(fk_calls *calls, fk_calls_left *out);
// Takes the calls that ended since the last time; returns how many of at most `max`.
int64_t fk_calls_take_events(fk_calls *calls, fk_call_event *out, int64_t max);
// Takes the times of layers in seconds; returns how many of at most `max`.
int64_t fk_calls_take_layer_seconds(fk_calls *calls, double *out, int64_t max);
// Takes the pairs of each function since the last time, layer after layer; zeros after the last one.
void fk_calls_take_pairs(fk_calls *calls, int64_t *out, int64_t n);
void fk_calls_read_totals(fk_calls *calls, fk_calls_totals *out, fk_function_totals *functions,
                          int64_t n_functions);

#ifdef __cplusplus
}
#endif
#endif
