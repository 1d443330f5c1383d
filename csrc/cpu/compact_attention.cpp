// compact_attention on the CPU: per image and head, K^T and V are packed once, then blocks of kept query rows run
//   S = Q K^T,  P = exp(S - max S),  O = P V / sum P
// as two GEMMs around a one-pass softmax, all in cache: never N x N. Threads share images x heads.
//
// bfloat16 uses bfloat16 GEMMs where the machine has instructions for them; everything else computes in float32.
#include "sait/compact_attention.h"

#define SAIT_KERNEL_FILE "cpu/compact_attention.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/gemm.h"

namespace sait::cpu::SAIT_ISA {
namespace attention {

constexpr float kLog2e = 1.44269504088896341f;
constexpr int64_t kMaxBlock = 126;  // whole tiles
constexpr int64_t kKeyAlign = 16;  // keys are transposed in tiles of 16

// Query rows per GEMM: few enough for S and P to stay in the cache, in blocks of whole tiles and equal size.
inline int64_t block_rows(int64_t rows, int64_t ld) {
  const int64_t most = std::clamp<int64_t>(8192 / ld, 2 * kTileRows, kMaxBlock);
  const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);  // an image may keep no row
  return round_up((rows + blocks - 1) / blocks, kTileRows);
}

// Prefetches rows [begin, end) of a head of q, k or v: short and far apart, they escape the hardware's prefetcher.
template <typename T>
inline void prefetch_rows(const T* head, int64_t row_stride, int64_t D, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t d = 0; d < D; d += 64 / sizeof(T)) __builtin_prefetch(head + i * row_stride + d, 0, 2);
  }
}

// One image and head.
struct Task {
  int64_t image, head;
  int64_t begin, keys;        // rows of the image in T
  int64_t first, queries;     // kept rows of the image in S
  const int32_t* indices;     // its kept rows, or nullptr for all
};

// Buffers for K^T, V and a block of Q of one image and head, n keys padded to ld.
template <typename T>
struct Packed {
  using Weight = T;

  T *keys, *values, *queries;
  int64_t D, ld, used;  // used: columns of P that the second GEMM reads

  Packed(int64_t head_dim, int64_t n, int64_t padded)
      : keys(scratch<T, 0>(head_dim * padded)),
        values(scratch<T, 1>(padded * head_dim)),
        queries(scratch<T, 2>(kMaxBlock * head_dim)),
        D(head_dim),
        ld(padded),
        used(round_up(n, 8)) {}
};

// As float: K^T (D, ld), V (ld, D), Q (rows, D).
template <typename E>
struct FloatGemms : Packed<float> {
  static constexpr bool kBFloat16Weights = false;
  using Packed<float>::Packed;

  void pack_keys_values(const typename E::type* k, int64_t k_stride, const typename E::type* v, int64_t v_stride,
                        int64_t n) {
    if constexpr (std::is_same_v<E, F32>) {
      transpose_f32(k, k_stride, n, ld, D, keys, ld);
    } else {
      pack_rows_f32<E>(k, k_stride, nullptr, 0, n, ld, D, 1.f, values);  // values serve as the staging area
      transpose_f32(values, D, n, ld, D, keys, ld);
    }
    pack_rows_f32<E>(v, v_stride, nullptr, 0, n, ld, D, 1.f, values);
  }
  void pack_queries(const typename E::type* q, int64_t stride, const int32_t* indices, int64_t offset, int64_t count,
                    bool negate) {
    pack_rows_f32<E>(q, stride, indices, offset, count, count, D, negate ? -1.f : 1.f, queries);
  }
  void logits(int64_t rows, float* S) const { gemm<F32>(rows, ld, D, queries, D, keys, ld, S, ld, false); }
  void output(int64_t rows, const float* P, float* O) const { gemm<F32>(rows, D, used, P, ld, values, D, O, D, false); }
};

#if defined(SAIT_VEC_AVX512_BF16)
// As bfloat16 in VNNI order: K^T (D / 2, ld, 2), V (ld / 2, D, 2); Q (rows, D), where it is if it can be.
struct BFloat16Gemms : Packed<uint16_t> {
  static constexpr bool kBFloat16Weights = true;
  using Packed<uint16_t>::Packed;

  const uint16_t* read = nullptr;  // the block's queries
  int64_t read_stride = 0;

  void pack_keys_values(const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride, int64_t n) {
    // A pair of neighbouring d of one key is one dword, so K^T in VNNI order is a transpose of dwords.
    for (int64_t j = 0; j < ld; j += 16) {
      const int64_t live = std::clamp<int64_t>(n - j, 0, 16);
      for (int64_t c = 0; c < D / 2; c += 16) {
        const int m = static_cast<int>(std::min<int64_t>(16, D / 2 - c));
        __m512i r[16];
        for (int i = 0; i < 16; ++i) {
          r[i] = i < live ? _mm512_maskz_loadu_epi32(lanes(m), k + (j + i) * k_stride + 2 * c) : _mm512_setzero_si512();
        }
        transpose16(r);
        for (int i = 0; i < m; ++i) {
          _mm512_storeu_si512(reinterpret_cast<uint32_t*>(keys) + (c + i) * ld + j, r[i]);
        }
      }
    }
    for (int64_t j = 0; j < ld; j += 2) {
      const __mmask16 low = j < n ? 0xffff : 0, high = j + 1 < n ? 0xffff : 0;
      for (int64_t d = 0; d < D; d += 16) {
        const __mmask16 m = lanes(lanes_at(d, D));
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m & low, v + j * v_stride + d));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m & high, v + (j + 1) * v_stride + d));
        _mm512_mask_storeu_epi32(reinterpret_cast<uint32_t*>(values) + j / 2 * D + d, m,
                                 _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
  void pack_queries(const uint16_t* q, int64_t stride, const int32_t* indices, int64_t offset, int64_t count,
                    bool negate) {
    const bool in_place = indices == nullptr && !negate;
    read = in_place ? q : queries;
    read_stride = in_place ? stride : D;
    if (in_place) return;
    const __m256i sign = _mm256_set1_epi16(negate ? static_cast<int16_t>(0x8000) : 0);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t* row = q + (indices ? indices[i] - offset : i) * stride;
      for (int64_t d = 0; d < D; d += 16) {
        const int m = lanes_at(d, D);
        store_half(queries + i * D + d, _mm256_xor_si256(load_half(row + d, m), sign), m);
      }
    }
  }
  void logits(int64_t rows, float* S) const { gemm<BF16>(rows, ld, D, read, read_stride, keys, 2 * ld, S, ld, false); }
  void output(int64_t rows, const uint16_t* P, float* O) const {
    gemm<BF16>(rows, D, used, P, ld, values, 2 * D, O, D, false);
  }
};

template <typename E>
using GemmsOf = std::conditional_t<std::is_same_v<E, BF16>, BFloat16Gemms, FloatGemms<E>>;
#else
template <typename E>
using GemmsOf = FloatGemms<E>;
#endif

// log2 of an attention weight: c (s - max s). In float the difference is taken first, so that the largest is exactly 0;
// rounded to bfloat16, one fused multiply-add is as good.
template <bool kBFloat16Weights>
inline Vec log_weight(Vec s, Vec largest, Vec shift, Vec c) {
  if constexpr (kBFloat16Weights) return fma(s, c, shift);
  else return (s - largest) * c;
}

inline float largest_of(const float* s, int64_t n) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t whole = n / kWidth * kWidth;
  const int rest = static_cast<int>(n - whole);
  Vec m0 = set(-kInfinity), m1 = m0;
  int64_t j = 0;
  for (; j + 2 * kWidth <= whole; j += 2 * kWidth) {
    m0 = max(m0, load(s + j));
    m1 = max(m1, load(s + j + kWidth));
  }
  for (; j < whole; j += kWidth) m0 = max(m0, load(s + j));
  if (rest > 0) m1 = max(m1, first(load(s + whole, rest), rest, -kInfinity));
  return max(max(m0, m1));
}

// s = scale s + bias in whole vectors; returns the largest. Behind the last key the bias, and what it leaves, is -inf.
inline float add_bias(float* s, const float* bias, int64_t ld, float scale) {
  const Vec factor = set(scale);
  Vec largest = set(-std::numeric_limits<float>::infinity());
  for (int64_t j = 0; j < ld; j += kWidth) {
    const Vec logit = fma(load(s + j), factor, load(bias + j));
    largest = max(largest, logit);
    store(s + j, logit);
  }
  return max(largest);
}

// The bias of an image's n keys as add_bias takes it, or nullptr where there is none.
inline const float* padded_bias(const CompactAttentionParams& p, int64_t begin, int64_t n, int64_t ld) {
  if (p.key_bias == nullptr) return nullptr;
  float* bias = scratch<float, 11>(ld);
  std::copy_n(p.key_bias + begin, n, bias);
  std::fill(bias + n, bias + ld, -std::numeric_limits<float>::infinity());
  return bias;
}

// weights = 2^(c (s - top)) over the first n columns, zero up to ld; returns 1 / sum. weights may be s itself.
template <bool kBFloat16Weights, typename Weight>
inline float weigh(const float* s, float top, int64_t n, int64_t ld, float scale, Weight* weights) {
  using E = std::conditional_t<kBFloat16Weights, BF16, F32>;
  const int64_t whole = n / kWidth * kWidth;
  const int rest = static_cast<int>(n - whole);
  const Vec largest = set(top), c = set(scale * kLog2e), shift = set(-top * scale * kLog2e);
  const auto weight = [&](Vec x) { return exp2<kBFloat16Weights>(log_weight<kBFloat16Weights>(x, largest, shift, c)); };
  Vec sum0 = set(0.f), sum1 = sum0;
  int64_t j = 0;
  for (; j + 2 * kWidth <= whole; j += 2 * kWidth) {
    const Vec p0 = weight(load(s + j)), p1 = weight(load(s + j + kWidth));
    sum0 = sum0 + p0;
    sum1 = sum1 + p1;
    store_as<E>(weights + j, p0);
    store_as<E>(weights + j + kWidth, p1);
  }
  for (; j < whole; j += kWidth) {
    const Vec p = weight(load(s + j));
    sum0 = sum0 + p;
    store_as<E>(weights + j, p);
  }
  if (rest > 0) {
    const Vec p = first(weight(load(s + whole, rest)), rest, 0.f);
    sum1 = sum1 + p;
    store_as<E>(weights + whole, p, rest);
  }
  std::fill(weights + n, weights + ld, Weight(0));
  return 1.f / sum(sum0 + sum1);
}

template <typename E, typename Gemms>
void attend(const CompactAttentionParams& p, const Task& task, int64_t part, int64_t parts) {
  using T = typename E::type;
  using Weight = typename Gemms::Weight;
  const int64_t D = p.head_dim, ld = round_up(task.keys, kKeyAlign);
  const int64_t block = block_rows(task.queries, ld);
  const int64_t blocks = (task.queries + block - 1) / block;
  const int64_t from = blocks * part / parts, to = blocks * (part + 1) / parts;
  if (from == to) return;

  const T* q = static_cast<const T*>(p.q.data) + task.begin * p.q.row_stride + task.head * p.q.head_stride;
  const T* k = static_cast<const T*>(p.k.data) + task.begin * p.k.row_stride + task.head * p.k.head_stride;
  const T* v = static_cast<const T*>(p.v.data) + task.begin * p.v.row_stride + task.head * p.v.head_stride;
  T* out = static_cast<T*>(p.out) + task.first * p.heads * D + task.head * D;

  Gemms gemms(D, task.keys, ld);
  gemms.pack_keys_values(k, p.k.row_stride, v, p.v.row_stride, task.keys);
  const float* bias = padded_bias(p, task.begin, task.keys, ld);
  const float factor = std::abs(p.scale), left = bias ? 1.f : factor;  // what the weights still have to scale by
  float* S = scratch<float, 3>(kMaxBlock * ld);
  float* O = scratch<float, 4>(kMaxBlock * D);
  Weight* P;
  if constexpr (Gemms::kBFloat16Weights) P = scratch<uint16_t, 5>(kMaxBlock * ld);
  else P = S;

  for (int64_t i0 = from * block; i0 < std::min(task.queries, to * block); i0 += block) {
    const int64_t rows = std::min(block, task.queries - i0);
    if (task.head + 1 < p.heads) {
      const int64_t begin = task.keys * (i0 / block) / blocks, end = task.keys * (i0 / block + 1) / blocks;
      prefetch_rows(q + p.q.head_stride, p.q.row_stride, D, begin, end);
      prefetch_rows(k + p.k.head_stride, p.k.row_stride, D, begin, end);
      prefetch_rows(v + p.v.head_stride, p.v.row_stride, D, begin, end);
    }
    // softmax takes the largest logit. With a negative scale that is the smallest q . k, so Q takes the scale's sign.
    gemms.pack_queries(task.indices ? q : q + i0 * p.q.row_stride, p.q.row_stride,
                       task.indices ? task.indices + i0 : nullptr, task.begin, rows, p.scale < 0);
    gemms.logits(rows, S);
    float top[kMaxBlock], inverse[kMaxBlock];
    for (int64_t i = 0; i < rows; ++i) {  // one loop over all rows, so that none waits for the one before
      top[i] = bias ? add_bias(S + i * ld, bias, ld, factor) : largest_of(S + i * ld, task.keys);
    }
    for (int64_t i = 0; i < rows; ++i) {
      inverse[i] = weigh<Gemms::kBFloat16Weights>(S + i * ld, top[i], task.keys, ld, left, P + i * ld);
    }
    gemms.output(rows, P, O);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec scale = set(inverse[i]);
      T* row = out + (i0 + i) * p.heads * D;
      for (int64_t d = 0; d < D; d += kWidth) {
        const int m = lanes_at(d, D);
        store_as<E>(row + d, load(O + i * D + d, m) * scale, m);
      }
    }
  }
}

inline Task task_at(const CompactAttentionParams& p, int64_t image, int64_t head) {
  Task task{image, head, p.batch.cu_seqlens[image], 0, p.kept.cu_seqlens[image], 0, nullptr};
  task.keys = p.batch.cu_seqlens[image + 1] - task.begin;
  task.queries = p.kept.cu_seqlens[image + 1] - task.first;
  if (p.kept.indices != nullptr) task.indices = p.kept.indices + task.first;
  return task;
}

template <typename E>
void attend_range(const CompactAttentionParams& p, int64_t parts, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Task task = task_at(p, i / parts / p.heads, i / parts % p.heads);
    if (task.queries == 0) continue;
    attend<E, GemmsOf<E>>(p, task, i % parts, parts);
  }
}

}  // namespace attention

void compact_attention(const CompactAttentionParams& p) {
  // Few images and heads: queries are shared out, too, at the price of packing K and V once more for each part. Blocks
  // stay whole, so results do not depend on the number of threads.
  const int64_t tasks = p.batch.images * p.heads, threads = num_threads();
  const int64_t parts = tasks == 0 || tasks >= 2 * threads ? 1 : (2 * threads + tasks - 1) / tasks;
  visit_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    parallel_for(tasks * parts, 1,
                 [&](int64_t begin, int64_t end) { attention::attend_range<E>(p, parts, begin, end); });
  });
}

namespace attention {

// One image and head of the backward pass, recomputing P. With dP = dO V^T and D_i = sum_j P_ij dP_ij:
//   dS = scale P (dP - D),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO,  dbias_j = sum_i P_ij (dP_ij - D_i)
template <typename E>
void differentiate(const CompactAttentionBackwardParams& b, const Task& task) {
  using T = typename E::type;
  const CompactAttentionParams& p = b.forward;
  const int64_t D = p.head_dim, n = task.keys, ld = round_up(n, kKeyAlign), stride = p.heads * D;
  const auto head_of = [&](const HeadView& view, int64_t row) {
    return static_cast<const T*>(view.data) + row * view.row_stride + task.head * view.head_stride;
  };
  const auto gradient_of = [&](void* data) { return static_cast<T*>(data) + task.begin * stride + task.head * D; };
  T *dq = gradient_of(b.dq), *dk = gradient_of(b.dk), *dv = gradient_of(b.dv);

  float* K = scratch<float, 0>(ld * D);
  float* Kt = scratch<float, 1>(D * ld);
  float* Vt = scratch<float, 2>(D * ld);
  float* dK = scratch<float, 3>(ld * D);
  float* dV = scratch<float, 4>(ld * D);
  pack_rows_f32<E>(head_of(p.v, task.begin), p.v.row_stride, nullptr, 0, n, ld, D, 1.f, K);  // K is free until below
  transpose_f32(K, D, n, ld, D, Vt, ld);
  pack_rows_f32<E>(head_of(p.k, task.begin), p.k.row_stride, nullptr, 0, n, ld, D, 1.f, K);
  transpose_f32(K, D, n, ld, D, Kt, ld);
  std::fill(dK, dK + ld * D, 0.f);
  std::fill(dV, dV + ld * D, 0.f);
  for (int64_t i = 0; i < n; ++i) std::fill(dq + i * stride, dq + i * stride + D, T(0));

  const int64_t block = round_up(block_rows(task.queries, ld), 16);  // transposed below, in tiles of 16
  float* Q = scratch<float, 5>((kMaxBlock + 16) * D);
  float* dO = scratch<float, 6>((kMaxBlock + 16) * D);
  float* dQ = scratch<float, 7>((kMaxBlock + 16) * D);
  float* P = scratch<float, 8>((kMaxBlock + 16) * ld);
  float* dS = scratch<float, 9>((kMaxBlock + 16) * ld);
  float* transposed = scratch<float, 10>(ld * (kMaxBlock + 16));
  const float* bias = padded_bias(p, task.begin, n, ld);
  const float factor = std::abs(p.scale), left = bias ? 1.f : factor;
  float* dbias = bias ? b.head_sums + task.head * p.total + task.begin : nullptr;
  float* block_sums = bias ? scratch<float, 12>(ld) : nullptr;
  if (bias) std::fill(dbias, dbias + n, 0.f);

  for (int64_t i0 = 0; i0 < task.queries; i0 += block) {
    const int64_t rows = std::min(block, task.queries - i0);
    const int32_t* indices = task.indices ? task.indices + i0 : nullptr;
    pack_rows_f32<E>(head_of(p.q, task.begin + (indices ? 0 : i0)), p.q.row_stride, indices, task.begin, rows, block, D,
                     p.scale < 0 ? -1.f : 1.f, Q);
    pack_rows_f32<E>(head_of(b.grad_out, task.first + i0), b.grad_out.row_stride, nullptr, 0, rows, block, D, 1.f, dO);
    gemm<F32>(block, ld, D, Q, D, Kt, ld, P, ld, false);
    gemm<F32>(block, ld, D, dO, D, Vt, ld, dS, ld, false);
    if (bias) std::fill(block_sums, block_sums + ld, 0.f);
    for (int64_t i = 0; i < rows; ++i) {
      float *weights = P + i * ld, *gradient = dS + i * ld;
      const float top = bias ? add_bias(weights, bias, ld, factor) : largest_of(weights, n);
      const Vec inverse = set(weigh<false>(weights, top, n, ld, left, weights));
      Vec dot = set(0.f);
      for (int64_t j = 0; j < ld; j += kWidth) {
        const Vec w = load(weights + j) * inverse;
        store(weights + j, w);
        dot = fma(w, load(gradient + j), dot);
      }
      const Vec mean = set(sum(dot)), scale = set(factor);  // Q carries the sign
      if (bias) {
        for (int64_t j = 0; j < ld; j += kWidth) {
          store(block_sums + j, fma(load(weights + j), load(gradient + j) - mean, load(block_sums + j)));
        }
      }
      for (int64_t j = 0; j < ld; j += kWidth) {
        store(gradient + j, scale * load(weights + j) * (load(gradient + j) - mean));
      }
    }
    // Sums of block sums: the error grows with the rows of a block and their number, not with all rows.
    for (int64_t j = 0; bias && j < n; ++j) dbias[j] += block_sums[j];
    std::fill(P + rows * ld, P + block * ld, 0.f);
    std::fill(dS + rows * ld, dS + block * ld, 0.f);
    gemm<F32>(block, D, ld, dS, ld, K, D, dQ, D, false);
    const float sign = p.scale < 0 ? -1.f : 1.f;
    for (int64_t i = 0; i < rows; ++i) {
      T* row = dq + (indices ? indices[i] - task.begin : i0 + i) * stride;
      for (int64_t d = 0; d < D; d += kWidth) {
        const int m = lanes_at(d, D);
        store_as<E>(row + d, load(dQ + i * D + d, m) * set(sign), m);
      }
    }
    transpose_f32(P, ld, block, block, ld, transposed, block);
    gemm<F32>(ld, D, block, transposed, block, dO, D, dV, D, true);
    transpose_f32(dS, ld, block, block, ld, transposed, block);
    gemm<F32>(ld, D, block, transposed, block, Q, D, dK, D, true);
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t d = 0; d < D; d += kWidth) {
      const int m = lanes_at(d, D);
      store_as<E>(dk + i * stride + d, load(dK + i * D + d, m), m);
      store_as<E>(dv + i * stride + d, load(dV + i * D + d, m), m);
    }
  }
}

template <typename E>
void differentiate_range(const CompactAttentionBackwardParams& b, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Task task = task_at(b.forward, i / b.forward.heads, i % b.forward.heads);
    if (task.keys > 0) differentiate<E>(b, task);
  }
}

}  // namespace attention

void compact_attention_backward(const CompactAttentionBackwardParams& b) {
  visit_dtype(b.forward.dtype, [&](auto element) {
    using E = decltype(element);
    parallel_for(b.forward.batch.images * b.forward.heads, 1,
                 [&](int64_t begin, int64_t end) { attention::differentiate_range<E>(b, begin, end); });
  });
  if (b.dkey_bias == nullptr) return;
  const int64_t rows = b.forward.batch.cu_seqlens[b.forward.batch.images];
  std::copy_n(b.head_sums, rows, b.dkey_bias);
  for (int64_t h = 1; h < b.forward.heads; ++h) {
    for (int64_t t = 0; t < rows; ++t) b.dkey_bias[t] += b.head_sums[h * b.forward.total + t];
  }
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {

void compact_attention(const CompactAttentionParams& p) { SAIT_DISPATCH(compact_attention, p); }
void compact_attention_backward(const CompactAttentionBackwardParams& p) {
  SAIT_DISPATCH(compact_attention_backward, p);
}

}  // namespace sait::cpu
#endif
