// Which experts stay in memory that cannot hold all of them: the pure policy.
//
// Least frequently used, with decay: an expert that was used less often than all that stay does not take
// the place of one of them, but leaves memory again once it is computed. How much stays is not configured
// but found out. It is unlimited until what should be in memory is missing; it shrinks while that happens,
// and grows slowly while it does not. Knows no addresses, files or clocks.
#ifndef FAASMOE_EXPERT_RESIDENCY_H
#define FAASMOE_EXPERT_RESIDENCY_H

#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

namespace fk {

// An expert of a layer that a call computes.
struct ExpertUse {
  uint64_t expert, layer;  // any numbers that name them
  int64_t bytes;           // of its weights
};

// What to do with the experts of a call, by their position in it.
struct ResidencyPlan {
  std::vector<uint8_t> is_read;     // not in memory, or not known to be
  std::vector<uint8_t> is_dropped;  // leaves memory once it is computed
  std::vector<uint64_t> evicted;    // other experts, which leave memory now
  std::vector<uint64_t> forgotten;  // experts that are no longer known, wherever they are
};

class ExpertResidency {
 public:
  static constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
  static constexpr double kDecay = 0.99;         // of a count of uses, at each call of the layer
  static constexpr double kRecentS = 10.0;       // what was not used for longer may have left memory for any reason
  static constexpr double kForgottenS = 60.0;    // without a use, after which an expert is unknown again
  static constexpr double kShrinking = 1.0 / 32; // most that a call takes of the capacity
  static constexpr double kGrowing = 1.0 / 50;   // of the capacity, in a second without misses
  static constexpr int64_t kTolerated = 256 << 10;  // bytes that a call may miss

  // Experts that a call uses, each once.
  void begin(double now_s, const ExpertUse *uses, int64_t n_uses, ResidencyPlan *plan);
  // After the call, with the bytes that were missing of experts that the plan did not expect to be read; the
  // plan is what to evict then.
  void finish(double now_s, int64_t missed_bytes, ResidencyPlan *plan);

  int64_t capacity_bytes() const { return capacity_; }
  int64_t kept_bytes() const { return kept_; }
  int64_t known_bytes() const { return known_; }

 private:
  struct Expert {
    uint64_t layer = 0;
    int64_t bytes = 0, seen = 0;  // `seen`: the layer's calls when it was last used
    double count = 0, used_s = 0;
    bool is_kept = false;
  };

  double count(const Expert &expert) const;
  bool keep(Expert *expert, ResidencyPlan *plan);
  void evict(uint64_t id, Expert *expert, ResidencyPlan *plan);
  void forget(double now_s, ResidencyPlan *plan);
  // The kept expert with the lowest count, of those that were not used at `except_s`; the end if there is none.
  std::unordered_map<uint64_t, Expert>::iterator rarest(double except_s);

  std::unordered_map<uint64_t, Expert> experts_;
  std::unordered_map<uint64_t, int64_t> calls_;  // of each layer
  int64_t capacity_ = kUnlimited, kept_ = 0, known_ = 0;
  double begun_s_ = 0, grown_s_ = 0, forgot_s_ = 0;  // times of the last call, change and look
};

}  // namespace fk
#endif
