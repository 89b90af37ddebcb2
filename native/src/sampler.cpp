#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "candidates.h"
#include "native_error.h"
#include "ops.h"

namespace vivace {

namespace {

constexpr int64_t kTile = 64;        // tokens of a maximum and of a partial sum
constexpr int64_t kGroupTiles = 16;  // tiles of a larger maximum
constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum class Status { fine, not_a_number, infinite, impossible };

// Memory of one thread.
struct Work {
  std::vector<float> logits;       // adjusted
  std::vector<float> raw_maxima;   // of each tile
  std::vector<float> maxima;       // of the adjusted logits' tiles
  std::vector<float> kth;          // for selection
  std::vector<float> sums;         // of each tile's weights
  std::vector<int32_t> counts;     // all zero between rows
  std::vector<int32_t> found_ids;  // gathered tokens, their logits and weights
  std::vector<float> found, weights, found_sums;
  Candidates candidates;
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

// At most the k-th largest of what the maxima are of, found without sorting; -inf if there are
// fewer maxima.
float bound_of_top_k(const std::vector<float>& maxima, double k, std::vector<float>& work) {
  work = maxima;
  const int64_t num_groups = static_cast<int64_t>(maxima.size()) / kGroupTiles;
  if (2 * k <= static_cast<double>(num_groups)) {  // larger maxima bound it nearly as well
    for (int64_t group = 0; group < num_groups; ++group)
      work[group] = *std::max_element(maxima.begin() + group * kGroupTiles,
                                      maxima.begin() + (group + 1) * kGroupTiles);
    work.resize(num_groups);
  }
  if (k > static_cast<double>(work.size())) return -kInfinity;
  const auto kth = work.begin() + static_cast<int64_t>(k) - 1;
  std::nth_element(work.begin(), kth, work.end(), std::greater<>());
  return *kth;
}

class Row {
 public:
  Row(const Kernels& kernels, const SampleArrays& arrays, int64_t row, Work& work)
      : ops_(*kernels.ops),
        arrays_(arrays),
        row_(row),
        size_(arrays.vocab_size),
        raw_(arrays.logits + row * arrays.vocab_size),
        logits_(raw_),
        maxima_(&work.raw_maxima),
        work_(work) {
    const int64_t num_tiles = (size_ + kTile - 1) / kTile;
    work_.sums.resize(num_tiles);
    work_.raw_maxima.resize(num_tiles);
    work_.found_ids.resize(size_);
    work_.found.resize(size_);
  }

  // Finds the maxima and, where they will be adjusted, copies the logits on the way.
  Status check(bool is_adjusted) {
    if (is_adjusted) work_.logits.resize(size_);
    maximum_ = top_ = ops_.maximum(raw_, size_, work_.raw_maxima.data(),
                                   is_adjusted ? work_.logits.data() : nullptr);
    if (std::isnan(maximum_)) return Status::not_a_number;
    return std::isinf(maximum_) ? Status::infinite : Status::fine;
  }

  // Whether penalties, a bias or forbidden tokens change the logits.
  bool is_adjusted() const {
    const auto [bias, bias_end] = range(arrays_.bias);
    const auto [forbidden, forbidden_end] = range(arrays_.forbidden);
    return is_penalized() || bias != bias_end || forbidden != forbidden_end;
  }

  void adjust() {
    work_.maxima = work_.raw_maxima;
    if (is_penalized()) penalize(arrays_.options[row_]);
    const auto [bias, bias_end] = range(arrays_.bias);
    for (int64_t i = bias; i < bias_end; ++i) {
      const int32_t id = arrays_.bias.ids[i];
      change(id, work_.logits[id] + arrays_.bias_values[i]);
    }
    const auto [forbidden, forbidden_end] = range(arrays_.forbidden);
    for (int64_t i = forbidden; i < forbidden_end; ++i)
      change(arrays_.forbidden.ids[i], -kInfinity);
    logits_ = work_.logits.data();
    maxima_ = &work_.maxima;
    top_ = ops_.maximum(work_.maxima.data(), static_cast<int64_t>(work_.maxima.size()), nullptr,
                        nullptr);
  }

  Status draw(int32_t& token) {
    const SamplingOptions& options = arrays_.options[row_];
    if (top_ == -kInfinity) return Status::impossible;
    if (!std::isfinite(top_)) return Status::infinite;
    if (options.temperature == 0.0) {
      token = find_top();
      return Status::fine;
    }
    scale_ = static_cast<float>(std::min(1.0 / options.temperature, 1e30));
    const double random = uniform(arrays_.keys[row_]);
    const bool is_top_k = options.top_k > 0 && options.top_k < static_cast<double>(size_);
    if (!is_top_k && options.typical_p >= 1.0 && options.top_p >= 1.0 && options.min_p <= 0.0) {
      token = draw_from_all(random);
      return Status::fine;
    }
    cut(options, is_top_k);
    token = work_.candidates.draw(random);
    return Status::fine;
  }

  // Log-probabilities of `token` and of the largest logits.
  void describe(int32_t token) {
    if (!has_sums_ || logits_ != raw_ || scale_ != 1.0f)
      ops_.exp_sums(raw_, maximum_, 1.0f, nullptr, work_.sums.data(), size_);
    const double normalizer = maximum_ + std::log(total_of(work_.sums));
    if (arrays_.logprobs) arrays_.logprobs[row_] = static_cast<float>(raw_[token] - normalizer);
    const int64_t num_top = arrays_.num_top;
    if (num_top == 0) return;
    const float bound = bound_of_top_k(work_.raw_maxima, static_cast<double>(num_top), work_.kth);
    const int64_t num_found = ops_.gather(raw_, work_.raw_maxima.data(), bound, size_,
                                          work_.found_ids.data(), work_.found.data());
    int32_t* ids = arrays_.top_ids + row_ * num_top;
    float* values = arrays_.top_logprobs + row_ * num_top;
    largest(work_.found.data(), num_found, num_top, ids, values);
    for (int64_t i = 0; i < num_top; ++i) {
      ids[i] = work_.found_ids[ids[i]];
      values[i] = static_cast<float>(values[i] - normalizer);
    }
  }

 private:
  bool is_penalized() const {
    const SamplingOptions& options = arrays_.options[row_];
    return arrays_.history.offsets &&
           (options.repetition_penalty != 1.0 || options.presence_penalty != 0.0 ||
            options.frequency_penalty != 0.0);
  }

  std::pair<int64_t, int64_t> range(const TokenLists& lists) const {
    if (!lists.offsets) return {0, 0};
    return {lists.offsets[row_], lists.offsets[row_ + 1]};
  }

  // One adjusted logit, and its tile's maximum with it.
  void change(int32_t id, float value) {
    float& logit = work_.logits[id];
    float& maximum = work_.maxima[id / kTile];
    const bool was_maximum = logit == maximum;
    logit = value;
    if (value >= maximum) {
      maximum = value;
    } else if (was_maximum) {
      const int64_t first = id / kTile * kTile;
      maximum = ops_.maximum(work_.logits.data() + first, std::min(kTile, size_ - first), nullptr,
                             nullptr);
    }
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
      float logit = work_.logits[ids[i]];
      logit = logit > 0.0f ? logit / repetition : logit * repetition;
      if (times > 0) logit = logit - presence - frequency * static_cast<float>(times);
      change(ids[i], logit);
      count = 0;
    }
  }

  // The first token with the largest logit.
  int32_t find_top() const {
    const int64_t tile = std::find(maxima_->begin(), maxima_->end(), top_) - maxima_->begin();
    const float* first = logits_ + tile * kTile;
    return static_cast<int32_t>(std::find(first, logits_ + size_, top_) - logits_);
  }

  // The weights of all tokens, summed by tiles.
  double sum_all() {
    ops_.exp_sums(logits_, top_, scale_, nullptr, work_.sums.data(), size_);
    has_sums_ = true;
    return total_of(work_.sums);
  }

  // The tokens whose logit is at least `lowest`, and their weights. Returns the sum of these, by
  // tiles of what was found.
  double find_from(double lowest) {
    const int64_t count = ops_.gather(logits_, maxima_->data(), static_cast<float>(lowest), size_,
                                      work_.found_ids.data(), work_.found.data());
    work_.weights.resize(count);
    work_.found_sums.resize((count + kTile - 1) / kTile);
    ops_.exp_sums(work_.found.data(), top_, scale_, work_.weights.data(), work_.found_sums.data(),
                  count);
    return total_of(work_.found_sums);
  }

  // The same down to where their weights are `enough`.
  void find_mass(double enough) {
    constexpr double kLastNats = 104.0;        // beyond, every weight is 0
    constexpr double kSurely = 1.0 + 0x1p-19;  // sums of float32 are off by less
    double nats = 4.0;
    while (find_from(top_ - nats / scale_) < enough * kSurely && nats < kLastNats)
      nats += std::max(1.5, nats / 4.0);
  }

  // Gathers few tokens, but all that the options may keep, and cuts them down.
  void cut(const SamplingOptions& options, bool is_top_k) {
    double enough = 0.0;  // of the weights, for top-p alone
    if (is_top_k) {
      find_from(bound_of_top_k(*maxima_, options.top_k, work_.kth));
    } else if (options.typical_p < 1.0) {
      find_from(-kInfinity);
    } else if (options.top_p < 1.0) {
      enough = options.top_p * sum_all();
      find_mass(enough);
    } else {
      constexpr double kSlack = 0.01;  // nats, far above the rounding of a weight
      find_from(top_ + (std::log(options.min_p) - kSlack) / scale_);
    }
    Candidates& candidates = work_.candidates;
    candidates.clear();
    for (size_t i = 0; i < work_.weights.size(); ++i)
      if (work_.weights[i] > 0.0f)
        candidates.add({work_.found[i], work_.weights[i], work_.found_ids[i]});
    if (is_top_k) candidates.keep_top_k(static_cast<size_t>(options.top_k));
    if (options.typical_p < 1.0) candidates.keep_typical(options.typical_p, top_, scale_);
    if (options.top_p < 1.0) {
      if (enough == 0.0) enough = options.top_p * candidates.total();
      candidates.keep_top_p(enough, scale_);
    }
    if (options.min_p > 0.0) candidates.keep_min_p(options.min_p);
  }

  // The first token, in order of ids, up to which the weights exceed random * total. Where the
  // roundings of a tile's sum and of its weights differ, the tile's last possible token.
  int32_t draw_from_all(double random) {
    const double target = random * sum_all();
    double sum = 0.0;
    int64_t tile = 0, last_tile = 0;
    for (; tile < static_cast<int64_t>(work_.sums.size()); ++tile) {
      if (work_.sums[tile] <= 0.0f) continue;
      last_tile = tile;
      if (sum + work_.sums[tile] > target) break;
      sum += work_.sums[tile];
    }
    const int64_t first = last_tile * kTile, count = std::min(kTile, size_ - first);
    float weights[kTile], tile_sum;
    ops_.exp_sums(logits_ + first, top_, scale_, weights, &tile_sum, count);
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (weights[i] <= 0.0f) continue;
      last = i;
      sum += weights[i];
      if (sum > target) break;
    }
    return static_cast<int32_t>(first + last);
  }

  const OpKernels& ops_;
  const SampleArrays& arrays_;
  const int64_t row_, size_;
  const float* raw_;
  const float* logits_;               // adjusted, or the raw ones
  const std::vector<float>* maxima_;  // of the tiles of `logits_`
  Work& work_;
  float maximum_ = 0.0f;             // of the raw logits
  float top_ = 0.0f, scale_ = 0.0f;  // of the adjusted ones; 1 / temperature
  bool has_sums_ = false;            // of all weights
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
    const bool is_adjusted = row.is_adjusted();
    status = row.check(is_adjusted);
    if (status == Status::fine && is_adjusted) row.adjust();
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
    statuses[index] = row.check(false);
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
