// What the first row of an image looks at, one head at a time: logits, softmax, and the sum over heads.
//
// score_tokens and prune_attention share these functions, so that they choose the same rows to the last bit: every sum
// has one order, whoever computes it, and no multiplication stands where the compiler could fuse it with an addition in
// one kernel and not in the other.
#pragma once

#include <limits>

#include "instructions.cuh"

namespace sait::cuda {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kTiny = std::numeric_limits<float>::min();
constexpr int kScoreThreads = 128;  // of a block that scores
constexpr int kPartialSums = 8;  // of a dot product: the chunks c, c + 8, ... of 16 bytes; 8 lanes read 128 bytes

template <typename E>
constexpr int kChunk = 16 / sizeof(E);  // elements of 16 bytes

// x[0, kChunk) of 16 bytes of elements.
SAIT_DEVICE void widen(uint4 chunk, float (&x)[4], float) {
  x[0] = float_of_bits(chunk.x), x[1] = float_of_bits(chunk.y);
  x[2] = float_of_bits(chunk.z), x[3] = float_of_bits(chunk.w);
}
template <typename E>
SAIT_DEVICE void widen(uint4 chunk, float (&x)[8], E) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i], E{});
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// sum + a[0] b[0] + a[1] b[1] + ..., one element of the two chunks after the other.
template <int kElements>
SAIT_DEVICE float add_products(const float (&a)[kElements], const float (&b)[kElements], float sum) {
#pragma unroll
  for (int i = 0; i < kElements; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

// The sum of eight lanes' partial sums, added in the same order as in sum_of_partials.
SAIT_DEVICE float sum_of_lanes(float partial) {
  for (int mask = 1; mask < kPartialSums; mask *= 2) partial += shuffle_xor(partial, mask);
  return partial;
}
SAIT_DEVICE float sum_of_partials(const float (&p)[kPartialSums]) {
  return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
}

// A sum over the 16-byte chunks of a row by one thread; term(c, sum) adds that of chunk c.
template <typename E, typename Term>
SAIT_DEVICE float sum_of_chunks(int head_dim, Term term) {
  float partials[kPartialSums] = {};
  const int chunks = head_dim / kChunk<E>;
  for (int first = 0; first < chunks; first += kPartialSums) {
#pragma unroll
    for (int i = 0; i < kPartialSums; ++i) {
      if (first + i < chunks) partials[i] = term(first + i, partials[i]);
    }
  }
  return sum_of_partials(partials);
}

// Adds chunk c of a row to its dot product with the query (float32, aligned to 16 bytes). add_squares does so for the
// dot product of the row with itself.
template <typename E>
SAIT_DEVICE float add_logit(const float* query, int c, uint4 chunk, float sum) {
  float x[kChunk<E>], y[kChunk<E>];
  widen(chunk, x, E{});
#pragma unroll
  for (int i = 0; i < kChunk<E>; i += 4) {
    const float4 part = *reinterpret_cast<const float4*>(query + c * kChunk<E> + i);
    y[i] = part.x, y[i + 1] = part.y, y[i + 2] = part.z, y[i + 3] = part.w;
  }
  return add_products(x, y, sum);
}
template <typename E>
SAIT_DEVICE float add_squares(uint4 chunk, float sum) {
  float x[kChunk<E>];
  widen(chunk, x, E{});
  return add_products(x, x, sum);
}

// query . key for one key, by one thread; row(c) returns the c-th 16 bytes of the key, from wherever they lie.
template <typename E, typename Row>
SAIT_DEVICE float class_logit(const float* query, int head_dim, Row row) {
  return sum_of_chunks<E>(head_dim, [&](int c, float sum) { return add_logit<E>(query, c, row(c), sum); });
}

// scale log2(e) as the sum of two float32 numbers. One alone is off by up to 1e-7, for all tokens alike, and so would
// be the sum over them.
struct Exponent {
  float high, low;

  explicit SAIT_DEVICE Exponent(float scale) {
    constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f;
    high = scale * kLog2e;
    low = fmaf(scale, kLog2eRest, fmaf(scale, kLog2e, -high));
  }
};

// exp(scale (s - s*)) for a logit s and the logit s* of the greatest exponent, to an ulp; 0 below 2^-125. The
// difference is taken before it is scaled: near 0, where the exponential is large, it is exact. ex2.approx is off by
// two ulp, and a multiprocessor computes 16 of them a cycle; this is 12 instructions, of which it issues 128 a cycle.
SAIT_DEVICE float softmax_numerator(float logit, float shift, const Exponent& factor) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: what is added to it becomes a whole number
  const float difference = logit - shift;
  const float whole = fmaf(difference, factor.high, kRound);
  const float rest = fmaf(difference, factor.low, fmaf(difference, factor.high, -(whole - kRound)));  // about +-1/2
  // 2^rest by a minimax polynomial of degree 6, off by 1.9e-9.
  float power = fmaf(1.534581e-4f, rest, 1.3399931e-3f);
  power = fmaf(power, rest, 9.6184891e-3f);
  power = fmaf(power, rest, 5.55032864e-2f);
  power = fmaf(power, rest, 2.402264625e-1f);
  power = fmaf(power, rest, 6.931471825e-1f);
  power = fmaf(power, rest, 1.f);
  // Multiplies by 2^whole: adding to the exponent's bits would lose a NaN.
  const float result = power * float_of_bits((float_bits(whole) << 23) + 0x3f800000u);
  return difference * factor.high < -125.f ? 0.f : result;
}

// Shared memory of the sums of a block.
struct SumScratch {
  double sums[kScoreThreads / kWarpSize];
  float greatest[kScoreThreads / kWarpSize];
};

// The sum and the greatest of the numbers item(j) for j in [0, n), by a warp or by a block of kScoreThreads. Both add
// in the same order, so the bits are the same: there are 128 partial sums, of which number t adds up items t, t + 128,
// ...; each 32 of them are added as a tree, and the four results one after the other. A warp holds four partial sums a
// lane, a block one a thread. The trees are in double: in float, beside a weight of nearly 1, each of the seven levels
// would round away up to half an ulp of the largest score.
template <int kThreads>
struct Team {
  static constexpr int kWarps = kScoreThreads / kWarpSize;
  static constexpr int kSums = kScoreThreads / kThreads;  // partial sums of a thread
  static_assert(kThreads == kWarpSize || kThreads == kScoreThreads);

  static SAIT_DEVICE int rank() { return static_cast<int>(threadIdx.x) % kThreads; }

  template <typename Item>
  static SAIT_DEVICE float greatest(int n, SumScratch* scratch, Item item) {
    float best = kLowest;
    for (int j = rank(); j < n; j += kThreads) best = fmaxf(best, item(j));
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2) best = fmaxf(best, shuffle_xor(best, mask));
    if constexpr (kThreads == kScoreThreads) {
      publish(scratch->greatest, best);
      for (int i = 0; i < kWarps; ++i) best = fmaxf(best, scratch->greatest[i]);
    }
    return best;
  }

  template <typename Item>
  static SAIT_DEVICE double sum(int n, SumScratch* scratch, Item item) {
    float sums[kSums] = {};
    for (int first = rank(); first - rank() < n; first += kScoreThreads) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const int j = first + i * kThreads;
        if (j < n) sums[i] += item(j);
      }
    }
    double trees[kSums];
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      trees[i] = sums[i];
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) trees[i] += shuffle_xor(trees[i], mask);
    }
    const double* parts = trees;
    if constexpr (kThreads == kScoreThreads) {
      publish(scratch->sums, trees[0]);
      parts = scratch->sums;
    }
    return ((parts[0] + parts[1]) + parts[2]) + parts[3];
  }

 private:
  template <typename T>
  static SAIT_DEVICE void publish(T* parts, T value) {
    sync_block();  // others may still read what was there
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = value;
    sync_block();
  }
};

// Turns n logits in shared or global memory into softmax(scale * logits), by the kThreads threads of a block, or by a
// warp (kThreads == 32), which needs no scratch. The logits must be visible to these threads; the results are so behind
// the next barrier.
template <int kThreads>
SAIT_DEVICE void softmax_in_place(float* logits, int n, float scale, SumScratch* scratch) {
  const float sign = scale < 0.f ? -1.f : 1.f;
  const Exponent factor(scale);
  const float shift = sign * Team<kThreads>::greatest(n, scratch, [=](int j) { return sign * logits[j]; });
  // A thread looks at the same numbers in each pass.
  const double total =
      Team<kThreads>::sum(n, scratch, [=](int j) { return logits[j] = softmax_numerator(logits[j], shift, factor); });
  // One over the total in two numbers: a weight is rounded once.
  const float inverse = 1.f / static_cast<float>(total);
  const float rest = inverse * static_cast<float>(fma(-static_cast<double>(inverse), total, 1.0));
  for (int j = Team<kThreads>::rank(); j < n; j += kThreads) logits[j] = fmaf(logits[j], inverse, logits[j] * rest);
}

// cls_value: turns n scores, sum_h A_h0j times the square root of the sum of squares of v_j, into shares of their sum
// over the patches, by all kScoreThreads threads. Values that are all zero have no importance to share out.
SAIT_DEVICE void share_out(float* scores, int n, int num_prefix, SumScratch* scratch) {
  using Block = Team<kScoreThreads>;
  sync_block();  // also keeps the compiler from fusing the scores' last multiplication with the sum below
  const double patches = Block::sum(n, scratch, [=](int j) { return j < num_prefix ? 0.f : scores[j]; });
  const float total = patches < kTiny ? kTiny : static_cast<float>(patches);
  for (int j = Block::rank(); j < n; j += kScoreThreads) scores[j] /= total;
}

}  // namespace sait::cuda
