// Which rows of an image stay: found by the threads of one block, without sorting.
//
// A score becomes a 32-bit key in its order, and the lowest key that stays is found by bisection between the least and
// the greatest: each step counts the keys that reach a bound (for a mass: adds up their weights, too). It ends once no
// doubt is left, for the mean of six softmaxes after 9 steps with 197 tokens, and 13 with 4096 (medians of 200). Up to
// kAloneKeys tokens each warp holds all keys, one warp as the other, and so none waits for another: a step over 197
// keys is 7 compares, 7 additions and a redux, about 40 cycles, where keys spread over four warps take a barrier and a
// pass through shared memory, about 110. Counting the rank of each key would be 2 x 197 steps of two instructions, a
// sort of 256 keys 36 exchanges of about 30 cycles.
#pragma once

#include <limits>

#include "sait/select.h"
#include "instructions.cuh"

namespace sait::cuda {

// How many patches of an image stay: `least` of them, which equals `most`, or where `mass` is not 0 the fewest within
// these limits that carry that share of the score. 1 <= least <= most <= patches, unless there are no patches.
struct DeviceRule {
  double mass;
  int least, most;
};

// The rule for an image with these patches. A count above them keeps them all.
SAIT_DEVICE DeviceRule rule_for(const KeepRule& rule, int patches) {
  const auto at_most_all = [patches](int64_t count) { return static_cast<int>(min(count, int64_t{patches})); };
  if (rule.mass > 0) {
    return {rule.mass, at_most_all(rule.min_keep), rule.max_keep < 0 ? patches : at_most_all(rule.max_keep)};
  }
  // As in cpu::topk_patches.
  const int64_t share = static_cast<int64_t>(ceil(rounded_product(rule.rate, patches) - 1e-6));
  const int count = at_most_all(rule.count > 0 ? rule.count : max(share, int64_t{1}));
  return {0, count, count};
}

constexpr int kAloneKeys = 512;  // a warp alone: 16 x 2 instructions and the redux, 70 cycles; in fours 120
constexpr int kHeldKeys = 16;  // in registers of a thread: four warps hold 2048; more are read anew in each step
constexpr int kMostWarps = 8;

// Shared memory of select_rows. Each exchange between warps uses the other half, so that one barrier is enough.
struct SelectScratch {
  double weights[2][kMostWarps];
  int counts[2][kMostWarps];
};

namespace selecting {

constexpr int kOutside = std::numeric_limits<int>::min();  // below the key of every score
constexpr int kGreatest = std::numeric_limits<int>::max();
constexpr int kInfinite = 0x7f800000;  // the key of an infinite score

// An integer in the order of the scores. Read as a signed integer, the bits of a positive float grow with it; those of
// a negative float shrink with it, so all but the sign is flipped. NaN becomes -inf, and -0 becomes +0, so that they
// tie.
SAIT_DEVICE int key_of(float score) {
  int bits = static_cast<int>(float_bits(score));
  const int magnitude = bits & 0x7fffffff;
  if (magnitude > kInfinite) bits = static_cast<int>(0xff800000u);
  if (magnitude == 0) bits = 0;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// What a key weighs towards the mass: max(score, 0). If there are infinite scores, they alone weigh, all alike; if no
// score is positive, every patch weighs 1. At mass 1 every positive weight counts as 1: the smallest would vanish in a
// sum.
SAIT_DEVICE float weight_of(int key, int best, double mass) {
  float weight = best > 0 ? float_of_bits(static_cast<uint32_t>(max(key, 0))) : 1.f;
  if (best == kInfinite) weight = key == best ? 1.f : 0.f;
  if (mass == 1.0) weight = weight > 0.f ? 1.f : 0.f;
  return weight;
}

struct Reached {
  int count = 0;
  double weight = 0;
};

// The keys of this thread, and sums over those of all threads that share an image.
template <int kThreads>
struct Keys {
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kMostWarps);

  const float* scores;
  SelectScratch& scratch;
  int n, num_prefix;
  int warp, lane;
  bool alone, in_registers;
  int begin, end;  // of the tokens that this warp looks at
  int half = 0;
  int held[kHeldKeys];

  SAIT_DEVICE Keys(const float* image_scores, int tokens, int prefix, SelectScratch& memory)
      : scores(image_scores), scratch(memory), n(tokens), num_prefix(prefix) {
    warp = static_cast<int>(threadIdx.x) / kWarpSize;
    lane = static_cast<int>(threadIdx.x) % kWarpSize;
    alone = n <= kAloneKeys;
    // Neighbouring tokens lie in neighbouring lanes, and the warps one after the other.
    const int span = alone ? n : (n + kThreads - 1) / kThreads * kWarpSize;
    begin = alone ? 0 : min(warp * span, n);
    end = min(begin + span, n);
    in_registers = span <= kHeldKeys * kWarpSize;
    if (!in_registers) return;
#pragma unroll
    for (int i = 0; i < kHeldKeys; ++i) {
      if (i % 4 == 0 && i * kWarpSize >= span) break;
      held[i] = load(begin + i * kWarpSize + lane);
    }
  }

  SAIT_DEVICE int load(int token) const {
    return token >= num_prefix && token < end ? key_of(scores[token]) : kOutside;
  }

  // visit(token, key) for each of this thread's tokens, those past the end included, whose keys are kOutside. All
  // lanes of a warp make the same visits.
  template <typename Visit>
  SAIT_DEVICE void each(Visit visit) const {
    if (in_registers) {
#pragma unroll
      for (int i = 0; i < kHeldKeys; ++i) {
        if (i % 4 == 0 && begin + i * kWarpSize >= end) break;
        visit(begin + i * kWarpSize + lane, held[i]);
      }
    } else {
      for (int token = begin + lane; token - lane < end; token += kWarpSize) visit(token, load(token));
    }
  }

  // Combines the warps' numbers, each the same in all lanes of its warp, into the block's; in the order of the warps,
  // so that results are repeatable. Two halves of scratch.counts in turn need one barrier, not two.
  template <typename Combine>
  SAIT_DEVICE int of_block(int value, Combine combine) {
    if (alone) return value;
    half ^= 1;
    if (lane == 0) scratch.counts[half][warp] = value;
    sync_block();
    value = scratch.counts[half][0];
    for (int i = 1; i < kWarps; ++i) value = combine(value, scratch.counts[half][i]);
    return value;
  }

  SAIT_DEVICE int greatest() {
    int key = kOutside;
    each([&](int, int other) { key = max(key, other); });
    return of_block(reduce_max(key), [](int a, int b) { return max(a, b); });
  }
  SAIT_DEVICE int least() {
    int key = kGreatest;
    each([&](int, int other) { key = other == kOutside ? key : min(key, other); });
    return of_block(reduce_min(key), [](int a, int b) { return min(a, b); });
  }

  SAIT_DEVICE int count_from(int bound) {
    int count = 0;
    each([&](int, int key) { count += key >= bound; });
    return of_block(reduce_add(count), [](int a, int b) { return a + b; });
  }
  SAIT_DEVICE Reached weigh_from(int bound, int best, double mass) {
    Reached sum;
    each([&](int, int key) {
      if (key < bound) return;
      ++sum.count;
      sum.weight += weight_of(key, best, mass);
    });
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum.weight += shuffle_xor(sum.weight, mask);
    if (!alone && lane == 0) scratch.weights[half ^ 1][warp] = sum.weight;  // of_block's half and barrier
    sum.count = of_block(reduce_add(sum.count), [](int a, int b) { return a + b; });
    if (!alone) {
      sum.weight = scratch.weights[half][0];
      for (int i = 1; i < kWarps; ++i) sum.weight += scratch.weights[half][i];
    }
    return sum;
  }
};

}  // namespace selecting

// Writes the rows that an image of n tokens keeps to `kept`, ascending, as first + token, prefix rows included; returns
// how many. Called by all kThreads threads of a block with the same arguments, scores[0, n) visible to all of them;
// `kept` and `scratch` are free for others behind the next barrier. Either may be shared or global memory.
// The order: higher score first, ties to the lower index, NaN lowest.
template <int kThreads>
SAIT_DEVICE int select_rows(const float* scores, int n, int num_prefix, const DeviceRule& rule, int32_t first,
                            SelectScratch& scratch, int32_t* kept) {
  using namespace selecting;
  num_prefix = min(num_prefix, n);
  Keys<kThreads> keys(scores, n, num_prefix, scratch);
  int low = 0, high = 0, above = 0, ties = 0;
  if (n > num_prefix) {
    // Invariant: the keys >= low are enough, the keys > high are not; the undecided ones are in [low, high]. The search
    // ends when one undecided key is left, when all of them have the same value (low == high), or when all of them have
    // to stay (those reached are no more than the least number).
    low = keys.least(), high = keys.greatest();
    const int best = high;
    Reached reached{n - num_prefix}, beyond;
    const bool weighs = rule.mass > 0;
    const double target = weighs ? rule.mass * keys.weigh_from(low, best, rule.mass).weight : 0;
    const auto enough = [&](int count, double weight) {
      return count >= rule.most || (weighs && count >= rule.least && weight >= target);
    };
    while (low < high && reached.count - beyond.count > 1 && reached.count > rule.least) {
      const int middle = (low | high) - ((low ^ high) >> 1);  // the mean, rounded up, without overflow
      const Reached half = weighs ? keys.weigh_from(middle, best, rule.mass) : Reached{keys.count_from(middle)};
      if (enough(half.count, half.weight)) {
        low = middle;
        reached = half;
      } else {
        high = middle - 1;
        beyond = half;
      }
    }
    above = beyond.count;
    ties = reached.count - above;
    if (low == high) {  // all undecided keys tie: `ties` becomes the fewest of them that are enough
      const double weight = weight_of(low, best, rule.mass);
      int few = 0;
      while (ties - few > 1) {
        const int middle = (few + ties) / 2;
        (enough(above + middle, beyond.weight + middle * weight) ? ties : few) = middle;
      }
    }
  }

  // The place of a row in `kept` is the number of kept rows before it: those above `high` (prefix rows count as such),
  // and the first `ties` of those in [low, high].
  const auto is_above = [&](int token, int key) { return token < min(num_prefix, keys.end) || key > high; };
  const auto is_tie = [&](int key) { return key != kOutside && key >= low && key <= high; };
  int above_before = 0, ties_before = 0;
  if (!keys.alone) {  // in the warps before this one
    int mine = 0, my_ties = 0;
    keys.each([&](int token, int key) {
      mine += is_above(token, key);
      my_ties += is_tie(key);
    });
    mine = reduce_add(mine), my_ties = reduce_add(my_ties);
    for (int i = 0; i < 2; ++i) {
      keys.of_block(i == 0 ? mine : my_ties, [](int a, int) { return a; });
      for (int w = 0; w < keys.warp; ++w) (i == 0 ? above_before : ties_before) += scratch.counts[keys.half][w];
    }
  }
  const uint32_t lanes_before = (1u << keys.lane) - 1;
  int turn = 0;  // if each warp holds all keys (alone), the warps write in turns
  keys.each([&](int token, int key) {
    const bool up = is_above(token, key), tie = is_tie(key);
    const uint32_t ups = ballot(up), equals = ballot(tie);
    const int ties_here = ties_before + count_bits(equals & lanes_before);
    if ((up || (tie && ties_here < ties)) && (!keys.alone || turn == keys.warp)) {
      kept[above_before + count_bits(ups & lanes_before) + min(ties_here, ties)] = first + token;
    }
    above_before += count_bits(ups);
    ties_before += count_bits(equals);
    turn = (turn + 1) % Keys<kThreads>::kWarps;
  });
  return num_prefix + above + ties;
}

}  // namespace sait::cuda
