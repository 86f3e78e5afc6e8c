// Functions as the kernel library computes them: weights of experts, layer by layer.
#ifndef FAASMOE_FUNCTION_WEIGHTS_H
#define FAASMOE_FUNCTION_WEIGHTS_H

#include <stdint.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "faasmoe_kernels.h"
#include "frame.h"

#ifdef __cplusplus
extern "C" {
#endif

// A file that weights are mapped from.
typedef struct fk_weights_file {
  const char *path;
  int64_t identity[5];               // its device, inode, size, mtime_ns and ctime_ns
} fk_weights_file;

// One layer of a function, as the caller of fk_sandbox_publish or fk_calls_add_local describes it.
// The tables are copied; the weights that they point to must stay until the function is retracted.
typedef struct fk_function_layer {
  int64_t layer;
  int64_t hidden_size;
  int64_t n_experts;                 // entries of `first` and `down`
  const fk_matrix *first, *down;     // zeros for experts outside the function
  fk_gating gating;
  int32_t dtype;                     // of the rows, enum fk_dtype
  int32_t max_rows_per_expert;       // more rows of one expert are not ordinary; 0: any number
  const fk_weights_file *files;      // that the weights are mapped from; NULL: they never change
  int64_t n_files;
} fk_function_layer;

#ifdef __cplusplus
}
#endif

namespace fk {

// Whether bytes of the guarded mapping that holds this address could not be read (sigbus_guard.cpp).
bool is_damaged(const void *address);
// Whether any guarded mapping was damaged since the process began.
bool is_any_damaged();

struct LayerWeights {
  int64_t layer, hidden_size;
  std::vector<fk_matrix> first, down;  // [n_experts]
  fk_gating gating;
  int32_t dtype, max_rows_per_expert;
  struct File {
    std::string path;
    int64_t identity[5];
  };
  std::vector<File> files;

  bool has_expert(int64_t expert) const {
    return expert < int64_t(first.size()) && first[size_t(expert)].codes != nullptr;
  }
  // Whether a file was written since it was verified, or could not be read. A file that was removed or replaced was not:
  // the mapping keeps the old bytes.
  bool is_changed() const;
};

struct FunctionWeights {
  std::string id;
  std::vector<LayerWeights> layers;
  std::atomic<int64_t> n_frames{0}, n_rows{0};
  int32_t n_running = 0;      // guarded by the owner's mutex, as the next
  bool is_retracted = false;  // must not be used any more

  const LayerWeights *find(int64_t layer) const;
};

// Copies the descriptions; nullptr and a message if one is invalid.
std::shared_ptr<FunctionWeights> copy_function(const char *id, const fk_function_layer *layers,
                                               int64_t n_layers, const char **error);

// Scratch memory of `compute_reduced`, reused from one call to the next.
struct ComputeScratch {
  std::vector<int64_t> counts, sizes, rows, to;
  std::vector<int32_t> part_of;     // of each pair
  std::vector<int64_t> positions;   // of each pair's sum
  std::vector<float> weights;
  std::vector<fk_matrix> first, down;
};

enum ComputeResult { kComputed, kTooManyRows, kComputeFailed };

// The pairs of a call, rows ascending.
struct CallPairs {
  int64_t n_rows, n_pairs;
  const int32_t *row, *expert;
  const float *weight;
};

// Finds out where sums go: function after function, the rows that have pairs of it. Returns how many
// sums that are, or -1 if none of `parts` has one of the experts.
int64_t place_sums(const LayerWeights *const *parts, int n_parts, const CallPairs &pairs, ComputeScratch *scratch);

// The weighted sums of each function, as placed: out [n_sums, hidden_size].
ComputeResult compute_sums(const LayerWeights *const *parts, int n_parts, const CallPairs &pairs, int64_t n_sums,
                           const void *rows, float *out, int32_t n_threads, ComputeScratch *scratch);

}  // namespace fk
#endif
