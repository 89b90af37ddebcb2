// Tokens that may be drawn, and what is kept of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace vivace {

struct Candidate {
  float logit, weight;
  int32_t id;
};

class Candidates {
 public:
  void clear() { items_.clear(); }
  void add(const Candidate& candidate) { items_.push_back(candidate); }
  double total() const;

  // Each keeps at least one. Ties go to the lower id.
  void keep_top_k(size_t k);
  // The smallest set of the most likely tokens whose weights add up to `enough`. `scale` brings
  // logits to nats.
  void keep_top_p(double enough, double scale);
  // The smallest set of the most typical tokens whose probabilities add up to `mass`: those whose
  // information is nearest to the entropy (Meister et al. 2022). `top` has the weight 1.
  void keep_typical(double mass, double top, double scale);
  void keep_min_p(double min_p);

  // The first, in order of ids, up to which the weights exceed random * total.
  int32_t draw(double random) const;

 private:
  using Rank = std::pair<double, int32_t>;  // what is kept first, ties to the lower id
  struct Ranked {
    Rank rank;
    float weight;
  };

  static Rank by_logit(const Candidate& c) { return {-static_cast<double>(c.logit), c.id}; }
  template <class F>
  void keep_mass(double enough, double scale, F rank_of);

  std::vector<Candidate> items_;  // in order of ids
  std::vector<Rank> ranks_;
  std::vector<Ranked> bucket_;
  std::vector<int16_t> buckets_;
};

}  // namespace vivace
