#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace vivace {

double Candidates::total() const {
  double total = 0.0;
  for (const Candidate& candidate : items_) total += candidate.weight;
  return total;
}

void Candidates::keep_top_k(size_t k) {
  if (items_.size() <= k) return;
  ranks_.clear();
  for (const Candidate& c : items_) ranks_.push_back(by_logit(c));
  const auto kth = ranks_.begin() + static_cast<int64_t>(k) - 1;
  std::nth_element(ranks_.begin(), kth, ranks_.end());
  const Rank last = *kth;
  std::erase_if(items_, [&](const Candidate& c) { return by_logit(c) > last; });
}

void Candidates::keep_top_p(double enough, double scale) {
  keep_mass(enough, scale, [](const Candidate& c) { return by_logit(c); });
}

void Candidates::keep_typical(double mass, double top, double scale) {
  const double sum = total(), log_sum = std::log(sum);
  const auto information = [&](const Candidate& c) {
    return log_sum - (static_cast<double>(c.logit) - top) * scale;
  };
  double entropy = 0.0;
  for (const Candidate& c : items_) entropy += c.weight / sum * information(c);
  keep_mass(mass * sum, 1.0,
            [&](const Candidate& c) { return Rank(std::abs(information(c) - entropy), c.id); });
}

// Keep candidates by rank until their weights reach `enough`. A histogram over the ranks (`scale`
// brings them to nats) finds where that is; only one of its buckets is sorted.
template <class F>
void Candidates::keep_mass(double enough, double scale, F rank_of) {
  constexpr int kBuckets = 2048;
  constexpr double kPerNat = 16.0;
  double first = rank_of(items_[0]).first;
  for (const Candidate& c : items_) first = std::min(first, rank_of(c).first);
  double weights[kBuckets] = {};
  buckets_.resize(items_.size());
  for (size_t i = 0; i < items_.size(); ++i) {
    const double nats = (rank_of(items_[i]).first - first) * scale;
    buckets_[i] = static_cast<int16_t>(std::min(nats * kPerNat, kBuckets - 1.0));
    weights[buckets_[i]] += items_[i].weight;
  }
  double sum = 0.0;
  int border = 0;
  while (border < kBuckets - 1 && sum + weights[border] < enough) sum += weights[border++];
  bucket_.clear();
  for (size_t i = 0; i < items_.size(); ++i)
    if (buckets_[i] == border) bucket_.push_back({rank_of(items_[i]), items_[i].weight});
  std::sort(bucket_.begin(), bucket_.end(),
            [](const Ranked& a, const Ranked& b) { return a.rank < b.rank; });
  Rank last = {std::numeric_limits<double>::infinity(), 0};
  for (const Ranked& ranked : bucket_) {
    sum += ranked.weight;
    if (sum < enough) continue;
    last = ranked.rank;
    break;
  }
  size_t kept = 0;
  for (size_t i = 0; i < items_.size(); ++i)
    if (buckets_[i] < border || (buckets_[i] == border && !(rank_of(items_[i]) > last)))
      items_[kept++] = items_[i];
  items_.resize(kept);
}

void Candidates::keep_min_p(double min_p) {
  float largest_weight = 0.0f;
  for (const Candidate& c : items_) largest_weight = std::max(largest_weight, c.weight);
  std::erase_if(items_, [&](const Candidate& c) { return c.weight < min_p * largest_weight; });
}

int32_t Candidates::draw(double random) const {
  const double target = random * total();
  double sum = 0.0;
  for (const Candidate& candidate : items_) {
    sum += candidate.weight;
    if (sum > target) return candidate.id;
  }
  return items_.back().id;
}

}  // namespace vivace
