// Draws of tokens from scores for one instruction set. Included by src/isa_*.cpp after
// router_ops_impl.h.
//
// Likelihoods are relative to the most likely token's, which is 1. They are summed in the vocabulary's
// order, so that a draw depends neither on the order of ties nor on other rows.

#include <cfloat>
#include <functional>

namespace FK_NAMESPACE {

constexpr int64_t kDrawChunk = 1024;
constexpr float kLeastExponent = -87.0f;  // whose power is a normal number; below it is 0

struct DrawScratch {
  std::vector<float> likelihoods, candidates;
  std::vector<double> sums;  // of each chunk of likelihoods
};

// e^((score - peak) / temperature) of each score.
static void fill_likelihoods(const float *scores, int64_t count, float peak, float temperature, float *to) {
  vf divisor = splat(std::max(temperature, FLT_MIN)), highest = splat(peak);
  auto likelihood = [&](vf x) {
    x = (x - highest) / divisor;
    return x < splat(kLeastExponent) ? vf{} : vector_exp(x);
  };
  int64_t whole = count / L * L;
  for (int64_t i = 0; i < whole; i += L) store(to + i, likelihood(load<vf>(scores + i)));
  if (whole == count) return;
  float rest[L];
  std::fill(rest, rest + L, -INFINITY);
  std::copy(scores + whole, scores + count, rest);
  store(rest, likelihood(load<vf>(rest)));
  std::copy(rest, rest + count - whole, to + whole);
}

// The sum of each chunk; returns their total.
static double sum_chunks(const std::vector<float> &values, std::vector<double> &sums) {
  constexpr int kParts = 8;  // independent, so that they are added as vectors
  int64_t count = int64_t(values.size());
  double total = 0;
  sums.clear();
  for (int64_t begin = 0; begin < count; begin += kDrawChunk) {
    int64_t end = std::min(begin + kDrawChunk, count), i = begin;
    double parts[kParts] = {}, sum = 0;
    for (; i + kParts <= end; i += kParts)
      for (int p = 0; p < kParts; ++p) parts[p] += double(values[i + p]);
    for (; i < end; ++i) sum += double(values[i]);
    for (double part : parts) sum += part;
    sums.push_back(sum);
    total += sum;
  }
  return total;
}

// The lowest of the likelihoods that make up `limit` together, most likely first; sorts as far.
static float lowest_within(std::vector<float> &likelihoods, double limit) {
  size_t n = likelihoods.size(), done = 0, step = kDrawChunk;
  for (double before = 0;; step *= 8) {
    size_t end = std::min(done + step, n);
    auto first = likelihoods.begin() + done, last = likelihoods.begin() + end;
    if (end < n) std::nth_element(first, last, likelihoods.end(), std::greater<float>());
    std::sort(first, last, std::greater<float>());
    for (; done < end; ++done) {
      if (done && before >= limit) return likelihoods[done - 1];
      before += double(likelihoods[done]);
    }
    if (done == n) return likelihoods[n - 1];
  }
}

// The lowest likelihood that may be drawn; all ties with it may.
static double lowest_kept(const std::vector<float> &likelihoods, const fk_draw &d, double total,
                          std::vector<float> &candidates) {
  int64_t count = int64_t(likelihoods.size());
  bool is_limited = d.top_k > 0 && d.top_k < count;
  if (!is_limited && d.top_p >= 1) return d.min_p;
  candidates.clear();
  for (float likelihood : likelihoods)
    if (likelihood > 0 && double(likelihood) >= d.min_p) candidates.push_back(likelihood);
  if (is_limited && d.top_k < int64_t(candidates.size())) {
    auto last = candidates.begin() + d.top_k - 1;
    std::nth_element(candidates.begin(), last, candidates.end(), std::greater<float>());
    candidates.resize(d.top_k);
  }
  if (d.top_p >= 1) return *std::min_element(candidates.begin(), candidates.end());
  if (is_limited || d.min_p > 0) {
    total = 0;
    for (float likelihood : candidates) total += double(likelihood);
  }
  return lowest_within(candidates, d.top_p * total);
}

// The token of a draw from scores whose highest is finite and at `highest`.
static int32_t draw(const float *scores, int64_t count, int32_t highest, const fk_draw &d) {
  static thread_local DrawScratch s;
  s.likelihoods.resize(count);
  fill_likelihoods(scores, count, scores[highest], d.temperature, s.likelihoods.data());
  double total = sum_chunks(s.likelihoods, s.sums);
  if (d.top_p < 1 || d.top_k > 0 || d.min_p > 0) {
    double lowest = lowest_kept(s.likelihoods, d, total, s.candidates);
    for (float &likelihood : s.likelihoods) likelihood = double(likelihood) < lowest ? 0.0f : likelihood;
    total = sum_chunks(s.likelihoods, s.sums);
  }
  double target = d.uniform * total, before = 0;
  int32_t token = highest;
  for (size_t chunk = 0; chunk < s.sums.size(); before += s.sums[chunk++]) {
    if (before + s.sums[chunk] <= target) continue;
    int64_t begin = int64_t(chunk) * kDrawChunk, end = std::min(begin + kDrawChunk, count);
    double sum = before;
    for (int64_t i = begin; i < end && sum <= target; ++i) {
      sum += double(s.likelihoods[i]);
      if (s.likelihoods[i] > 0) token = int32_t(i);  // the last one if the sum is rounded down
    }
    break;
  }
  return token;
}

}  // namespace FK_NAMESPACE
