#include "expert_residency.h"

#include <algorithm>
#include <cmath>

namespace fk {

double ExpertResidency::count(const Expert &expert) const {
  return expert.count * std::pow(kDecay, double(calls_.at(expert.layer) - expert.seen));
}

std::unordered_map<uint64_t, ExpertResidency::Expert>::iterator ExpertResidency::rarest(double except_s) {
  auto found = experts_.end();
  double least = 0;
  for (auto it = experts_.begin(); it != experts_.end(); ++it) {
    if (!it->second.is_kept || it->second.used_s == except_s) continue;
    double uses = count(it->second);
    if (found != experts_.end() && uses >= least) continue;
    found = it;
    least = uses;
  }
  return found;
}

void ExpertResidency::evict(uint64_t id, Expert *expert, ResidencyPlan *plan) {
  expert->is_kept = false;
  kept_ -= expert->bytes;
  plan->evicted.push_back(id);
}

// Keeps an expert, in place of those that are used less often; false if there is no room.
bool ExpertResidency::keep(Expert *expert, ResidencyPlan *plan) {
  if (expert->bytes > capacity_) return false;
  double uses = count(*expert);
  while (kept_ > capacity_ - expert->bytes) {
    auto other = rarest(begun_s_);
    if (other == experts_.end() || count(other->second) >= uses) return false;
    evict(other->first, &other->second, plan);
  }
  expert->is_kept = true;
  kept_ += expert->bytes;
  return true;
}

void ExpertResidency::begin(double now_s, const ExpertUse *uses, int64_t n_uses, ResidencyPlan *plan) {
  begun_s_ = now_s;
  plan->is_read.assign(size_t(n_uses), 0);
  plan->is_dropped.assign(size_t(n_uses), 0);
  plan->evicted.clear();
  forget(now_s, plan);
  for (int64_t i = 0; i < n_uses; ++i) {
    auto [at, is_new] = experts_.try_emplace(uses[i].expert);
    Expert &expert = at->second;
    if (is_new) {
      expert.layer = uses[i].layer;
      expert.bytes = uses[i].bytes;
      known_ += expert.bytes;
    }
    int64_t &calls = calls_[expert.layer];
    if (i == 0 || uses[i].layer != uses[i - 1].layer) ++calls;
    plan->is_read[size_t(i)] = !expert.is_kept || now_s - expert.used_s > kRecentS;
    expert.count = (is_new ? 0 : count(expert)) + 1;
    expert.seen = calls;
    expert.used_s = now_s;
  }
  for (int64_t i = 0; i < n_uses; ++i) {  // now none of the call's experts takes another one's place
    Expert &expert = experts_.at(uses[i].expert);
    if (!expert.is_kept) plan->is_dropped[size_t(i)] = !keep(&expert, plan);
  }
}

void ExpertResidency::finish(double now_s, int64_t missed_bytes, ResidencyPlan *plan) {
  plan->evicted.clear();
  if (missed_bytes > kTolerated) {
    int64_t most = capacity_ == kUnlimited ? kept_ : capacity_;
    capacity_ = most - std::min(missed_bytes, int64_t(kShrinking * double(most)));
    grown_s_ = now_s;
    while (kept_ > capacity_) {
      auto other = rarest(std::numeric_limits<double>::infinity());
      evict(other->first, &other->second, plan);
    }
  } else if (capacity_ != kUnlimited && now_s > grown_s_) {
    capacity_ += int64_t(kGrowing * double(capacity_) * std::min(now_s - grown_s_, 1.0));
    grown_s_ = now_s;
    if (capacity_ > known_) capacity_ = kUnlimited;
  }
}

void ExpertResidency::forget(double now_s, ResidencyPlan *plan) {
  plan->forgotten.clear();
  if (now_s - forgot_s_ < kRecentS) return;
  forgot_s_ = now_s;
  for (auto it = experts_.begin(); it != experts_.end();) {
    if (now_s - it->second.used_s <= kForgottenS) {
      ++it;
      continue;
    }
    plan->forgotten.push_back(it->first);
    known_ -= it->second.bytes;
    if (it->second.is_kept) kept_ -= it->second.bytes;
    it = experts_.erase(it);
  }
}

}  // namespace fk
