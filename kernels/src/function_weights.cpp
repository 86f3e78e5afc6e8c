#include "function_weights.h"

#include <sys/stat.h>

#include <algorithm>
#include <iterator>

#include "limited_memory.h"

namespace fk {

namespace {

// Experts of one layer may lie in several guarded mappings.
bool has_damage(const std::vector<fk_matrix> &matrices) {
  return std::any_of(matrices.begin(), matrices.end(), [](const fk_matrix &m) {
    const void *parts[] = {m.codes, m.codes_upper, m.scales, m.scales_upper, m.factors, m.factors_upper, m.zeros, m.bias};
    return std::any_of(std::begin(parts), std::end(parts), [](const void *part) { return part && is_damaged(part); });
  });
}

bool is_written(const char *path, const int64_t *identity) {
  struct stat now;
  if (stat(path, &now)) return false;
  if (int64_t(now.st_dev) != identity[0] || int64_t(now.st_ino) != identity[1]) return false;
  auto ns = [](const timespec &t) { return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec; };
  return int64_t(now.st_size) != identity[2] || ns(now.st_mtim) != identity[3] || ns(now.st_ctim) != identity[4];
}

}  // namespace

bool LayerWeights::is_changed() const {
  if (is_any_damaged() && (has_damage(first) || has_damage(down))) return true;
  return std::any_of(files.begin(), files.end(),
                     [](const File &file) { return is_written(file.path.c_str(), file.identity); });
}

const LayerWeights *FunctionWeights::find(int64_t layer) const {
  for (const LayerWeights &weights : layers)
    if (weights.layer == layer) return &weights;
  return nullptr;
}

std::shared_ptr<FunctionWeights> copy_function(const char *id, const fk_function_layer *layers,
                                               int64_t n_layers, const char **error) {
  auto function = std::make_shared<FunctionWeights>();
  function->id = id;
  for (int64_t i = 0; i < n_layers; ++i) {
    const fk_function_layer &layer = layers[i];
    if (layer.layer < 0 || layer.layer > 65535 || layer.hidden_size < 1 || layer.n_experts < 1 ||
        layer.n_experts > (1 << 20) || !layer.first || !layer.down || layer.dtype < FK_FLOAT32 ||
        layer.dtype > FK_FLOAT16 || layer.n_files < 0 || (layer.n_files && !layer.files)) {
      *error = "layers: an index, size, dtype or address is out of range";
      return nullptr;
    }
    LayerWeights weights{layer.layer, layer.hidden_size, {layer.first, layer.first + layer.n_experts},
                         {layer.down, layer.down + layer.n_experts}, layer.gating, layer.dtype,
                         layer.max_rows_per_expert, {}};
    for (int64_t f = 0; f < layer.n_files; ++f) {
      LayerWeights::File file{layer.files[f].path, {}};
      std::copy(layer.files[f].identity, layer.files[f].identity + 5, file.identity);
      weights.files.push_back(std::move(file));
    }
    function->layers.push_back(std::move(weights));
  }
  return function;
}

int64_t place_sums(const LayerWeights *const *parts, int n_parts, const CallPairs &pairs, ComputeScratch *s) {
  int64_t n_sums = 0;
  s->part_of.assign(size_t(pairs.n_pairs), -1);
  s->positions.resize(size_t(pairs.n_pairs));
  for (int part = 0; part < n_parts; ++part) {
    int32_t last_row = -1;
    for (int64_t i = 0; i < pairs.n_pairs; ++i) {
      if (s->part_of[size_t(i)] >= 0 || !parts[part]->has_expert(pairs.expert[i])) continue;
      s->part_of[size_t(i)] = part;
      if (pairs.row[i] != last_row) ++n_sums;
      last_row = pairs.row[i];
      s->positions[size_t(i)] = n_sums - 1;
    }
  }
  bool is_complete = std::none_of(s->part_of.begin(), s->part_of.end(), [](int32_t part) { return part < 0; });
  return is_complete ? n_sums : -1;
}

ComputeResult compute_sums(const LayerWeights *const *parts, int n_parts, const CallPairs &pairs, int64_t n_sums,
                           const void *rows, float *out, int32_t n_threads, ComputeScratch *s) {
  int64_t n_experts = 0;
  for (int i = 0; i < n_parts; ++i) n_experts = std::max(n_experts, int64_t(parts[i]->first.size()));
  s->counts.assign(size_t(n_experts) + 1, 0);
  for (int64_t i = 0; i < pairs.n_pairs; ++i) ++s->counts[size_t(pairs.expert[i]) + 1];
  s->sizes.clear();
  s->first.clear();
  s->down.clear();
  int32_t limit = parts[0]->max_rows_per_expert;
  for (int64_t e = 0; e < n_experts; ++e) {
    int64_t count = s->counts[size_t(e) + 1];
    s->counts[size_t(e) + 1] += s->counts[size_t(e)];
    if (!count) continue;
    if (limit && count > limit) return kTooManyRows;
    int part = 0;
    while (!parts[part]->has_expert(e)) ++part;  // one has it: the sums were placed
    s->sizes.push_back(count);
    s->first.push_back(parts[part]->first[size_t(e)]);
    s->down.push_back(parts[part]->down[size_t(e)]);
  }
  s->rows.resize(size_t(pairs.n_pairs));
  s->to.resize(size_t(pairs.n_pairs));
  s->weights.resize(size_t(pairs.n_pairs));
  for (int64_t i = 0; i < pairs.n_pairs; ++i) {
    size_t place = size_t(s->counts[size_t(pairs.expert[i])]++);
    s->rows[place] = pairs.row[i];
    s->to[place] = s->positions[size_t(i)];
    s->weights[place] = pairs.weight[i];
  }
  fk_pairs sorted{int64_t(s->sizes.size()), s->sizes.data(), s->rows.data(), s->to.data(), s->weights.data(), n_sums};
  const LayerWeights &layer = *parts[0];
  int32_t status = fk_layer_experts(layer.layer, s->first.data(), s->down.data(), &layer.gating, &sorted, rows,
                                    layer.dtype, layer.hidden_size, pairs.n_rows, out, n_threads);
  return status ? kComputeFailed : kComputed;
}

}  // namespace fk
