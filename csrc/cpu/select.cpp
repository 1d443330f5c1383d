// select_topk and select_mass on the CPU, in three steps: how many patches stay (k), the score of the k-th best
// (threshold), then one pass that keeps the patches that reach it, in ascending order of their rows.
#define SAIT_KERNEL_FILE "cpu/select.cpp"
#include "cpu/foreach_isa.h"
#include "sait/select.h"

namespace sait::cpu::SAIT_ISA {

// Integers in the order of the scores. Read as a signed integer, the bits of a positive float grow with it; those of a
// negative float shrink with it, so all but the sign is flipped. NaN becomes -inf; adding 0 turns -0 into +0, so that
// the two tie.
void order_keys(const float* scores, int64_t n, int32_t* keys) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    const float score = (scores[i] == scores[i] ? scores[i] : kLowest) + 0.f;
    int32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    keys[i] = bits ^ ((bits >> 31) & 0x7fffffff);
  }
}

// A bound that at least k keys reach (>=) and at most k keys exceed (>), by bisection over the 2^32 values. Each step
// counts all keys without a branch on data; a partition would mispredict every other branch. 1 <= k <= n.
int32_t threshold(const int32_t* keys, int64_t n, int64_t k) {
  int64_t low = std::numeric_limits<int32_t>::min(), high = std::numeric_limits<int32_t>::max();
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    const int32_t bound = static_cast<int32_t>(middle);
    int32_t reached = 0;
    for (int64_t i = 0; i < n; ++i) reached += keys[i] >= bound;
    if (reached == k) return bound;
    if (reached > k) low = middle;
    else high = middle - 1;
  }
  return static_cast<int32_t>(low);
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

// Rows that take one thread a few microseconds, which is what waking a second thread costs; fewer for select_mass,
// which sorts.
constexpr int64_t kTopkGrain = 4096;
constexpr int64_t kMassGrain = 512;

void order_keys(const float* scores, int64_t n, int32_t* keys) { SAIT_DISPATCH(order_keys, scores, n, keys); }
int32_t threshold(const int32_t* keys, int64_t n, int64_t k) { SAIT_DISPATCH(threshold, keys, n, k); }

float score_of(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
}

// The smallest k for which the k best weights, summed from the best down, reach mass times the sum of all (top-p). A
// weight is max(score, 0). If there are infinite scores, they alone weigh, all alike; if no score is positive, every
// patch weighs 1. Sorts the keys, the best first.
int64_t mass_patches(const KeepRule& rule, int32_t* keys, int64_t n) {
  std::sort(keys, keys + n, [](int32_t a, int32_t b) { return a > b; });
  const float best = score_of(keys[0]);
  const auto weight = [&](int64_t i) -> double {
    const float score = score_of(keys[i]);
    if (std::isinf(best) && best > 0) return score == best;
    return best > 0 ? std::max(score, 0.f) : 1.0;
  };
  double total = 0;
  int64_t positive = 0;
  for (int64_t i = 0; i < n; ++i) {
    total += weight(i);
    positive += weight(i) > 0;
  }
  int64_t k = positive;
  if (rule.mass < 1.0) {  // mass 1 keeps every positive weight, also those too small to change the rounded sum
    double cumulative = 0;
    for (k = 0; k < n && cumulative < rule.mass * total; ++k) cumulative += weight(k);
  }
  k = std::max(k, rule.min_keep);
  return std::min(rule.max_keep < 0 ? k : std::min(k, rule.max_keep), n);
}

}  // namespace

// The 1e-6 takes off the rounding error of rate * patches, which is at most patches * 2^-53: 0.55 of 100 is 55, not 56.
int64_t topk_patches(const KeepRule& rule, int64_t patches) {
  if (rule.count > 0) return rule.count;
  return std::max<int64_t>(1, static_cast<int64_t>(std::ceil(rule.rate * static_cast<double>(patches) - 1e-6)));
}

int64_t select_image(const float* scores, int64_t begin, int64_t end, int64_t num_prefix, const KeepRule& rule,
                     int32_t* kept) {
  const int64_t prefix = std::min(num_prefix, end - begin), n = end - begin - prefix;
  for (int64_t i = 0; i < prefix; ++i) kept[i] = static_cast<int32_t>(begin + i);
  if (n == 0) return prefix;
  kept += prefix;
  begin += prefix;

  thread_local std::vector<int32_t> keys, sorted;
  keys.resize(n);
  order_keys(scores + prefix, n, keys.data());
  int64_t k;
  if (rule.mass > 0) {
    sorted = keys;
    k = mass_patches(rule, sorted.data(), n);
  } else {
    k = topk_patches(rule, n);
  }

  const int32_t bound = threshold(keys.data(), n, k);
  int64_t ties = k;  // of the keys equal to the bound, the first `ties` stay
  for (int64_t i = 0; i < n; ++i) ties -= keys[i] > bound;
  // No branch on the scores: every key is written to kept[count], and count moves on only if the key stays. The loop
  // ends at k, so no write goes beyond kept[k - 1].
  for (int64_t i = 0, count = 0; count < k; ++i) {
    const bool tie = keys[i] == bound;
    kept[count] = static_cast<int32_t>(begin + i);
    count += (keys[i] > bound) | (tie & (ties > 0));
    ties -= tie;
  }
  return prefix + k;
}

void select(const SelectParams& p) {
  const int64_t images = p.batch.images;
  if (images == 0) return;
  const int32_t* cu = p.batch.cu_seqlens;
  const int64_t rows = p.rule.mass > 0 ? kMassGrain : kTopkGrain;
  const int64_t grain = std::max<int64_t>(1, rows * images / std::max(1, cu[images]));
  parallel_for(images, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t length =
          select_image(p.scores + cu[b], cu[b], cu[b + 1], p.num_prefix, p.rule, p.indices + p.offsets[b]);
      if (p.lengths != nullptr) p.lengths[b] = static_cast<int32_t>(length);
    }
  });
}

}  // namespace sait::cpu
#endif
