#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "native_error.h"
#include "ops.h"

namespace vivace {

namespace {

constexpr int64_t kTile = 64;  // tokens per partial sum of `exp_sums`
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum class Status { fine, not_a_number, infinite, impossible };

struct Candidate {
  float logit, weight;
  int32_t id;
};

using Rank = std::pair<double, int32_t>;  // what is kept first, ties to the lower id

// Memory of one thread.
struct Work {
  std::vector<float> logits, weights, sums;
  std::vector<int32_t> counts;        // all zero between rows
  std::vector<Candidate> candidates;  // in order of ids
  std::vector<Rank> ranks;
};

Work& thread_work() {
  static thread_local Work work;
  return work;
}

double total_of(const std::vector<float>& sums) {
  double total = 0.0;
  for (float sum : sums) total += sum;
  return total;
}

double total_of(const std::vector<Candidate>& candidates) {
  double total = 0.0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

class Row {
 public:
  Row(const Kernels& kernels, const SampleArrays& arrays, int64_t row, Work& work)
      : ops_(*kernels.ops),
        arrays_(arrays),
        row_(row),
        size_(arrays.vocab_size),
        raw_(arrays.logits + row * arrays.vocab_size),
        work_(work) {
    work_.sums.resize((size_ + kTile - 1) / kTile);
  }

  Status check() {
    maximum_ = ops_.maximum(raw_, size_);
    if (std::isnan(maximum_)) return Status::not_a_number;
    return std::isinf(maximum_) ? Status::infinite : Status::fine;
  }

  // Log-probabilities of `token` and of the largest logits.
  void describe(int32_t token) {
    ops_.exp_sums(raw_, maximum_, 1.0f, nullptr, work_.sums.data(), size_);
    const double normalizer = maximum_ + std::log(total_of(work_.sums));
    if (arrays_.logprobs) arrays_.logprobs[row_] = static_cast<float>(raw_[token] - normalizer);
    float* values = arrays_.top_logprobs + row_ * arrays_.num_top;
    largest(raw_, size_, arrays_.num_top, arrays_.top_ids + row_ * arrays_.num_top, values);
    for (int64_t i = 0; i < arrays_.num_top; ++i)
      values[i] = static_cast<float>(values[i] - normalizer);
  }

  Status draw(int32_t& token) {
    const SamplingOptions& options = arrays_.options[row_];
    const float* logits = adjust(options);
    top_ = logits == raw_ ? maximum_ : ops_.maximum(logits, size_);
    if (top_ == -kInfinity) return Status::impossible;
    if (!std::isfinite(top_)) return Status::infinite;
    if (options.temperature == 0.0) {
      token = static_cast<int32_t>(std::find(logits, logits + size_, top_) - logits);
      return Status::fine;
    }
    work_.weights.resize(size_);
    scale_ = static_cast<float>(std::min(1.0 / options.temperature, 1e30));
    ops_.exp_sums(logits, top_, scale_, work_.weights.data(), work_.sums.data(), size_);
    const double random = uniform(arrays_.keys[row_]);
    const bool is_top_k = options.top_k > 0 && options.top_k < static_cast<double>(size_);
    const bool is_cut = is_top_k || options.typical_p < 1.0 || options.top_p < 1.0;
    if (!is_cut && options.min_p <= 0.0) {
      token = draw_from_all(random);
      return Status::fine;
    }
    total_ = 0.0;
    double min_weight = 0.0;  // of tokens that may be kept
    if (!is_cut) {
      min_weight = options.min_p;
    } else if (!is_top_k && options.typical_p >= 1.0) {
      // Even all lighter tokens together are less than half of what top-p leaves out.
      total_ = total_of(work_.sums);
      min_weight = (1.0 - options.top_p) * total_ / static_cast<double>(2 * size_);
    }
    gather(logits, is_top_k ? bound_of_top_k(logits, options.top_k) : -kInfinity, min_weight);
    if (is_top_k) keep_top_k(static_cast<size_t>(options.top_k));
    if (options.typical_p < 1.0) keep_typical(options.typical_p);
    if (options.top_p < 1.0) keep_top_p(options.top_p);
    if (options.min_p > 0.0) keep_min_p(options.min_p);
    token = draw_from_candidates(random);
    return Status::fine;
  }

 private:
  // Penalties, bias and forbidden tokens; the raw logits themselves if there are none.
  const float* adjust(const SamplingOptions& options) {
    const bool is_penalized = arrays_.history.offsets &&
                              (options.repetition_penalty != 1.0 ||
                               options.presence_penalty != 0.0 || options.frequency_penalty != 0.0);
    const auto [bias, bias_end] = range(arrays_.bias);
    const auto [forbidden, forbidden_end] = range(arrays_.forbidden);
    if (!is_penalized && bias == bias_end && forbidden == forbidden_end) return raw_;
    work_.logits.assign(raw_, raw_ + size_);
    if (is_penalized) penalize(options);
    for (int64_t i = bias; i < bias_end; ++i)
      work_.logits[arrays_.bias.ids[i]] += arrays_.bias_values[i];
    for (int64_t i = forbidden; i < forbidden_end; ++i)
      work_.logits[arrays_.forbidden.ids[i]] = -kInfinity;
    return work_.logits.data();
  }

  void penalize(const SamplingOptions& options) {
    constexpr int32_t kSeen = 1 << 30;  // beside the number of times a token was generated
    work_.counts.resize(size_);
    const auto [begin, end] = range(arrays_.history);
    const int64_t generated = begin + arrays_.num_prompt_ids[row_];
    const int32_t* ids = arrays_.history.ids;
    for (int64_t i = begin; i < end; ++i) {
      int32_t& count = work_.counts[ids[i]];
      count = (count | kSeen) + (i >= generated);
    }
    const float repetition = static_cast<float>(options.repetition_penalty);
    const float presence = static_cast<float>(options.presence_penalty);
    const float frequency = static_cast<float>(options.frequency_penalty);
    for (int64_t i = begin; i < end; ++i) {
      int32_t& count = work_.counts[ids[i]];
      if (count == 0) continue;  // done
      const int32_t times = count & ~kSeen;
      float& logit = work_.logits[ids[i]];
      logit = logit > 0.0f ? logit / repetition : logit * repetition;
      if (times > 0) logit = logit - presence - frequency * static_cast<float>(times);
      count = 0;
    }
  }

  std::pair<int64_t, int64_t> range(const TokenLists& lists) const {
    if (!lists.offsets) return {0, 0};
    return {lists.offsets[row_], lists.offsets[row_ + 1]};
  }

  void gather(const float* logits, float lowest, double min_weight) {
    work_.candidates.clear();
    for (int64_t i = 0; i < size_; ++i)
      if (logits[i] >= lowest && work_.weights[i] > 0.0f && work_.weights[i] >= min_weight)
        work_.candidates.push_back({logits[i], work_.weights[i], static_cast<int32_t>(i)});
  }

  // The k-th largest of all tile maxima: at most the k-th largest logit, found without sorting.
  float bound_of_top_k(const float* logits, double top_k) const {
    const int64_t num_tiles = static_cast<int64_t>(work_.sums.size());
    if (top_k > static_cast<double>(num_tiles)) return -kInfinity;
    std::vector<float> maxima(num_tiles);
    for (int64_t tile = 0; tile < num_tiles; ++tile)
      maxima[tile] =
          *std::max_element(logits + tile * kTile, logits + std::min(size_, (tile + 1) * kTile));
    const auto kth = maxima.begin() + static_cast<int64_t>(top_k) - 1;
    std::nth_element(maxima.begin(), kth, maxima.end(), std::greater<>());
    return *kth;
  }

  static Rank by_logit(const Candidate& c) { return {-static_cast<double>(c.logit), c.id}; }

  void keep_top_k(size_t k) {
    if (work_.candidates.size() <= k) return;
    work_.ranks.clear();
    for (const Candidate& c : work_.candidates) work_.ranks.push_back(by_logit(c));
    const auto kth = work_.ranks.begin() + static_cast<int64_t>(k) - 1;
    std::nth_element(work_.ranks.begin(), kth, work_.ranks.end());
    const Rank last = *kth;
    std::erase_if(work_.candidates, [&](const Candidate& c) { return by_logit(c) > last; });
  }

  // The smallest set of the most likely tokens whose probabilities add up to `mass`.
  void keep_top_p(double mass) {
    keep_mass(mass, scale_, [](const Candidate& c) { return by_logit(c); });
  }

  // The smallest set of the most typical tokens whose probabilities add up to `mass`: those whose
  // information is nearest to the entropy (Meister et al. 2022).
  void keep_typical(double mass) {
    const double total = total_of(work_.candidates), log_total = std::log(total);
    const auto information = [&](const Candidate& c) {
      return log_total - (static_cast<double>(c.logit) - top_) * scale_;
    };
    double entropy = 0.0;
    for (const Candidate& c : work_.candidates) entropy += c.weight / total * information(c);
    keep_mass(mass, 1.0,
              [&](const Candidate& c) { return Rank(std::abs(information(c) - entropy), c.id); });
  }

  // Keep candidates by rank until their weights reach `mass` of the whole. A histogram over the
  // ranks (`scale` brings them to nats) finds where that is; only one of its buckets is sorted.
  template <class F>
  void keep_mass(double mass, double scale, F rank_of) {
    constexpr int kBuckets = 2048;
    constexpr double kPerNat = 16.0;
    std::vector<Candidate>& all = work_.candidates;
    double first = rank_of(all[0]).first;
    for (const Candidate& c : all) first = std::min(first, rank_of(c).first);
    const auto bucket_of = [&](const Rank& rank) {
      return static_cast<int>(std::min((rank.first - first) * scale * kPerNat, kBuckets - 1.0));
    };
    double weights[kBuckets] = {};
    for (const Candidate& c : all) weights[bucket_of(rank_of(c))] += c.weight;
    const double enough = mass * (total_ > 0.0 ? total_ : total_of(all));
    double sum = 0.0;
    int bucket = 0;
    while (bucket < kBuckets - 1 && sum + weights[bucket] < enough) sum += weights[bucket++];
    work_.ranks.clear();
    for (const Candidate& c : all)
      if (bucket_of(rank_of(c)) == bucket) work_.ranks.push_back(rank_of(c));
    std::sort(work_.ranks.begin(), work_.ranks.end());
    Rank last = {std::numeric_limits<double>::infinity(), 0};
    for (const Rank& rank : work_.ranks) {
      sum += work_.weights[rank.second];
      if (sum < enough) continue;
      last = rank;
      break;
    }
    std::erase_if(all, [&](const Candidate& c) { return rank_of(c) > last; });
  }

  void keep_min_p(double min_p) {
    std::vector<Candidate>& all = work_.candidates;
    float largest_weight = 0.0f;
    for (const Candidate& c : all) largest_weight = std::max(largest_weight, c.weight);
    std::erase_if(all, [&](const Candidate& c) { return c.weight < min_p * largest_weight; });
  }

  // The first token, in order of ids, up to which the weights exceed random * total. Where the
  // roundings of a tile's sum and of its weights differ, the tile's last possible token.
  int32_t draw_from_all(double random) const {
    const double target = random * total_of(work_.sums);
    double sum = 0.0;
    int64_t tile = 0, last_tile = 0;
    for (; tile < static_cast<int64_t>(work_.sums.size()); ++tile) {
      if (work_.sums[tile] <= 0.0f) continue;
      last_tile = tile;
      if (sum + work_.sums[tile] > target) break;
      sum += work_.sums[tile];
    }
    int64_t last = 0;
    const int64_t end = std::min(size_, (last_tile + 1) * kTile);
    for (int64_t i = last_tile * kTile; i < end; ++i) {
      if (work_.weights[i] <= 0.0f) continue;
      last = i;
      sum += work_.weights[i];
      if (sum > target) break;
    }
    return static_cast<int32_t>(last);
  }

  int32_t draw_from_candidates(double random) const {
    const double target = random * total_of(work_.candidates);
    double sum = 0.0;
    for (const Candidate& candidate : work_.candidates) {
      sum += candidate.weight;
      if (sum > target) return candidate.id;
    }
    return work_.candidates.back().id;
  }

  const OpKernels& ops_;
  const SampleArrays& arrays_;
  const int64_t row_, size_;
  const float* raw_;
  Work& work_;
  float maximum_ = 0.0f;             // of the raw logits
  float top_ = 0.0f, scale_ = 1.0f;  // of the adjusted ones; 1 / temperature
  double total_ = 0.0;               // of all weights, where light ones are no candidates
};

void report(const std::vector<Status>& statuses) {
  for (size_t row = 0; row < statuses.size(); ++row) {
    const std::string name = "row " + std::to_string(row);
    switch (statuses[row]) {
      case Status::fine:
        break;
      case Status::not_a_number:
        throw NativeError("the logits of " + name +
                          " hold NaN: the weights are damaged or a "
                          "technique broke them");
      case Status::infinite:
        throw NativeError("the largest logit of " + name + " is not finite");
      case Status::impossible:
        throw NativeError("every token of " + name + " is forbidden: allow at least one");
    }
  }
}

void check_ids(const TokenLists& lists, const SampleArrays& arrays, const char* name) {
  if (!lists.offsets) return;
  for (int64_t i = lists.offsets[0]; i < lists.offsets[arrays.num_rows]; ++i)
    if (lists.ids[i] < 0 || lists.ids[i] >= arrays.vocab_size)
      throw NativeError(std::string(name) + " names token " + std::to_string(lists.ids[i]) +
                        ", which is not in the vocabulary of " + std::to_string(arrays.vocab_size));
}

}  // namespace

void sample(const Kernels& kernels, Pool& pool, const SampleArrays& arrays) {
  check_ids(arrays.history, arrays, "the history");
  check_ids(arrays.bias, arrays, "logit_bias");
  check_ids(arrays.forbidden, arrays, "the list of forbidden tokens");
  std::vector<Status> statuses(arrays.num_rows, Status::fine);
  pool.parallel(arrays.num_rows, [&](int64_t index, int) {
    Row row(kernels, arrays, index, thread_work());
    int32_t& token = arrays.tokens[index];
    Status& status = statuses[index];
    status = row.check();
    if (status == Status::fine) status = row.draw(token);
    if (status == Status::fine && arrays.logprobs) row.describe(token);
  });
  report(statuses);
}

void log_probs(const Kernels& kernels, Pool& pool, const SampleArrays& arrays,
               const int32_t* targets) {
  for (int64_t row = 0; row < arrays.num_rows; ++row)
    if (targets[row] < 0 || targets[row] >= arrays.vocab_size)
      throw NativeError("target " + std::to_string(targets[row]) + " is not in the vocabulary of " +
                        std::to_string(arrays.vocab_size));
  std::vector<Status> statuses(arrays.num_rows, Status::fine);
  pool.parallel(arrays.num_rows, [&](int64_t index, int) {
    Row row(kernels, arrays, index, thread_work());
    statuses[index] = row.check();
    if (statuses[index] == Status::fine) row.describe(targets[index]);
  });
  report(statuses);
}

void largest(const float* x, int64_t size, int64_t count, int32_t* ids, float* values) {
  int64_t filled = 0;
  for (int64_t i = 0; count > 0 && i < size; ++i) {
    if (filled == count && !(x[i] > values[count - 1])) continue;
    int64_t at = filled < count ? filled++ : count - 1;
    for (; at > 0 && x[i] > values[at - 1]; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x[i];
    ids[at] = static_cast<int32_t>(i);
  }
}

double uniform(const RandomKey& key) {
  uint32_t counter[4] = {static_cast<uint32_t>(key.position),
                         static_cast<uint32_t>(key.position >> 32),
                         static_cast<uint32_t>(key.stream), static_cast<uint32_t>(key.purpose)};
  uint32_t round_key[2] = {static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = uint64_t{0xD2511F53} * counter[0];
    const uint64_t high = uint64_t{0xCD9E8D57} * counter[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(high >> 32) ^ counter[1] ^ round_key[0], static_cast<uint32_t>(high),
        static_cast<uint32_t>(low >> 32) ^ counter[3] ^ round_key[1], static_cast<uint32_t>(low)};
    std::copy(next, next + 4, counter);
    round_key[0] += 0x9E3779B9;
    round_key[1] += 0xBB67AE85;
  }
  return (static_cast<double>(counter[0] >> 5) * 67108864.0 + (counter[1] >> 6)) /
         9007199254740992.0;
}

}  // namespace vivace
