// score_tokens on the CPU. The class token's scores read K once, row by row with all its heads. `column` runs blocks of
// queries against all keys, softmax and column sums in cache: never N x N.
#define SAIT_KERNEL_FILE "cpu/score_tokens.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "sait/score_tokens.h"

namespace sait::cpu::SAIT_ISA {
namespace scoring {

constexpr float kLog2e = 1.44269504088896341f;
constexpr int64_t kMaxBlock = 64;  // query rows of `column`: 64 x 577 logits are 148 KB, a part of the L2 cache

// Slots of scratch(), apart from those of compact_attention: prune_attention calls score_image.
enum Slot { kWeights = 16, kHeadSums, kFactors, kQueryGrad, kKeys, kKeysT, kKeyGrad, kQueries, kLogits, kLogitsT };

// The rows of one image.
template <typename E>
struct Image {
  using T = typename E::type;
  int64_t begin, n;
  const T *q, *k, *v;

  Image(const ScoreTokensParams& p, int64_t image)
      : begin(p.batch.cu_seqlens[image]),
        n(p.batch.cu_seqlens[image + 1] - begin),
        q(static_cast<const T*>(p.q.data) + begin * p.q.row_stride),
        k(static_cast<const T*>(p.k.data) + begin * p.k.row_stride),
        v(p.v.data == nullptr ? nullptr : static_cast<const T*>(p.v.data) + begin * p.v.row_stride) {}
};

// row[0, n) = exp(scale (s - s*)), s* the s of the largest exponent; zero from n to `padded`. Returns the sum. The
// difference is taken before it is scaled: near 0, where the exponential is large, it is exact.
inline float softmax_numerators(float* row, int64_t n, int64_t padded, float scale) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  const Vec sign = set(scale < 0.f ? -1.f : 1.f), factor = set(scale * kLog2e);
  Vec largest = set(kLowest);
  for_each_vec(
      n, [&](int64_t i, int m) { largest = max(largest, first(load_lanes<F32>(row + i, m) * sign, m, kLowest)); });
  const Vec shift = set(max(largest)) * sign;
  const float total = sum_over(n, [=](int64_t i, int m) {
    const Vec numerators = first(exp2<false>((load_lanes<F32>(row + i, m) - shift) * factor), m, 0.f);
    store_lanes<F32>(row + i, numerators, m);
    return numerators;
  });
  std::fill(row + n, row + padded, 0.f);
  return total;
}

// out[j] = factor * sum over heads of rows[h * stride + j].
inline void sum_heads(const float* rows, int64_t stride, int64_t heads, int64_t n, float factor, float* out) {
  for_each_vec(n, [=](int64_t j, int m) {
    Vec total = load_lanes<F32>(rows + j, m);
    for (int64_t h = 1; h < heads; ++h) total = total + load_lanes<F32>(rows + h * stride + j, m);
    store_lanes<F32>(out + j, total * set(factor), m);
  });
}

// How a dot product advances: kStep elements at a time into one vector of partial sums.
template <typename E>
struct DotProduct {
  static constexpr int kStep = kWidth;
  using Elements = Vec;
  static Elements load(const typename E::type* p, int n) { return load_lanes<E>(p, n); }
  static Vec add(Elements a, Elements b, Vec total) { return fma(a, b, total); }
};
#if defined(SAIT_VEC_AVX512_BF16)
template <>
struct DotProduct<BF16> {
  static constexpr int kStep = 32;
  using Elements = __m512bh;
  static Elements load(const uint16_t* p, int n) {
    return n == kStep ? reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))
                      : reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << n) - 1u, p));
  }
  static Vec add(Elements a, Elements b, Vec total) { return {_mm512_dpbf16_ps(total.v, a, b)}; }
};
#endif

// q . k of one head for kWidth rows of K at these offsets: independent sums, so none waits for the last, and one
// reduction for all of them.
template <typename E>
inline Vec dot_rows(const typename E::type* q, const typename E::type* k, const int64_t* offsets, int64_t D) {
  using P = DotProduct<E>;
  Vec partial[kWidth];
  for (int r = 0; r < kWidth; ++r) partial[r] = set(0.f);
  int64_t d = 0;
  for (; d + P::kStep <= D; d += P::kStep) {
    const typename P::Elements query = P::load(q + d, P::kStep);
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) partial[r] = P::add(query, P::load(k + offsets[r] + d, P::kStep), partial[r]);
  }
  if (d < D) {
    const int rest = static_cast<int>(D - d);
    const typename P::Elements query = P::load(q + d, rest);
#pragma GCC unroll 16
    for (int r = 0; r < kWidth; ++r) partial[r] = P::add(query, P::load(k + offsets[r] + d, rest), partial[r]);
  }
  return sums(partial);
}

// A (H, stride): the softmax of the class token's row over the image's keys, zero from n on. stride % kWidth == 0.
template <typename E>
float* class_attention(const ScoreTokensParams& p, const Image<E>& x, int64_t stride) {
  float* A = scratch<float, kWeights>(p.heads * stride);
  for (int64_t j = 0; j < x.n; j += kWidth) {
    int64_t offsets[kWidth];  // past the last row: that row again, and the result is not used
    for (int64_t r = 0; r < kWidth; ++r) offsets[r] = std::min(j + r, x.n - 1) * p.k.row_stride;
    for (int64_t h = 0; h < p.heads; ++h) {
      store(A + h * stride + j, dot_rows<E>(x.q + h * p.q.head_stride, x.k + h * p.k.head_stride, offsets, p.head_dim));
    }
  }
  for (int64_t h = 0; h < p.heads; ++h) {
    float* row = A + h * stride;
    const Vec inverse = set(1.f / softmax_numerators(row, x.n, stride, p.scale));
    for (int64_t j = 0; j < stride; j += kWidth) store(row + j, load(row + j) * inverse);
  }
  return A;
}

// ||v_j|| over all heads together.
template <typename E>
inline float value_norm(const ScoreTokensParams& p, const Image<E>& x, int64_t j) {
  Vec squares = set(0.f);
  for (int64_t h = 0; h < p.heads; ++h) {
    const typename E::type* v = x.v + j * p.v.row_stride + h * p.v.head_stride;
    for_each_vec(p.head_dim, [&, v](int64_t d, int m) {
      const Vec a = load_lanes<E>(v + d, m);
      squares = fma(a, a, squares);
    });
  }
  return std::sqrt(sum(squares));
}

// The sum of u over the patches; an image whose values are all zero has no importance to share out.
inline float patch_sum(const float* u, int64_t n, int64_t num_prefix) {
  return sum_over(n - num_prefix, [=](int64_t i, int m) { return load_lanes<F32>(u + num_prefix + i, m); });
}
constexpr float kTiny = std::numeric_limits<float>::min();

template <typename E>
void class_scores(const ScoreTokensParams& p, int64_t image, float* scores) {
  const Image<E> x(p, image);
  if (x.n == 0) return;
  const int64_t stride = round_up(x.n, kWidth);
  const float* A = class_attention(p, x, stride);
  if (p.kind == ScoreKind::kCls) return sum_heads(A, stride, p.heads, x.n, 1.f / static_cast<float>(p.heads), scores);
  sum_heads(A, stride, p.heads, x.n, 1.f, scores);
  for (int64_t j = 0; j < x.n; ++j) scores[j] *= value_norm(p, x, j);
  const float total = std::max(patch_sum(scores, x.n, p.num_prefix), kTiny);
  for (int64_t j = 0; j < x.n; ++j) scores[j] /= total;
}

// Both scores have dL/dA_hj = c_j for all heads alike:
//   cls        c_j = g_j / H
//   cls_value  with u_j = a_j r_j, a_j = sum_h A_hj, r_j = ||v_j||, U = sum of u over the patches, s_j = u_j / U:
//              du_j = (g_j - [j is a patch] sum_i g_i s_i) / U,  c_j = du_j r_j,  dv_j = du_j a_j v_j / r_j
// and from there, with scale in it, l_hj = scale A_hj (c_j - sum_i A_hi c_i), dk_hj = l_hj q_h, dq_h = sum_j l_hj k_hj.
template <typename E>
void class_backward(const ScoreTokensBackwardParams& b, int64_t image) {
  using T = typename E::type;
  const ScoreTokensParams& p = b.forward;
  const Image<E> x(p, image);
  if (x.n == 0) return;
  const int64_t H = p.heads, D = p.head_dim, stride = round_up(x.n, kWidth), row = H * D;
  const float* g = b.grad + x.begin;
  T* dq = static_cast<T*>(b.dq) + x.begin * row;
  T* dk = static_cast<T*>(b.dk) + x.begin * row;
  float* A = class_attention(p, x, stride);
  float* c = scratch<float, kFactors>(stride);

  if (p.kind == ScoreKind::kCls) {
    for (int64_t j = 0; j < x.n; ++j) c[j] = g[j] / static_cast<float>(H);
  } else {
    float* a = scratch<float, kHeadSums>(3 * stride);
    float *norms = a + stride, *u = norms + stride;
    sum_heads(A, stride, H, x.n, 1.f, a);
    for (int64_t j = 0; j < x.n; ++j) norms[j] = value_norm(p, x, j);
    for (int64_t j = 0; j < x.n; ++j) u[j] = a[j] * norms[j];
    const float total = patch_sum(u, x.n, p.num_prefix), U = std::max(total, kTiny);
    double shared = 0;  // through U, unless U is clamped
    for (int64_t i = 0; total >= kTiny && i < x.n; ++i) shared += static_cast<double>(g[i]) * u[i] / U;
    T* dv = static_cast<T*>(b.dv) + x.begin * row;
    for (int64_t j = 0; j < x.n; ++j) {
      const float du = (g[j] - (j < p.num_prefix ? 0.f : static_cast<float>(shared))) / U;
      c[j] = norms[j] > 0 ? du * norms[j] : 0.f;
      const float factor = norms[j] > 0 ? du * a[j] / norms[j] : 0.f;
      for (int64_t h = 0; h < H; ++h) {
        const T* v = x.v + j * p.v.row_stride + h * p.v.head_stride;
        T* out = dv + j * row + h * D;
        for_each_vec(D, [=](int64_t d, int m) { store_lanes<E>(out + d, load_lanes<E>(v + d, m) * set(factor), m); });
      }
    }
  }

  float* dq_first = scratch<float, kQueryGrad>(row);
  std::fill(dq_first, dq_first + row, 0.f);
  for (int64_t h = 0; h < H; ++h) {
    float* weights = A + h * stride;
    const T* q = x.q + h * p.q.head_stride;
    float* total = dq_first + h * D;
    const float mean =
        sum_over(x.n, [=](int64_t j, int m) { return load_lanes<F32>(weights + j, m) * load_lanes<F32>(c + j, m); });
    for (int64_t j = 0; j < x.n; ++j) {
      const Vec dlogit = set(p.scale * weights[j] * (c[j] - mean));
      const T* k = x.k + j * p.k.row_stride + h * p.k.head_stride;
      T* out = dk + j * row + h * D;
      for_each_vec(D, [=](int64_t d, int m) {
        store_lanes<E>(out + d, dlogit * load_lanes<E>(q + d, m), m);
        store_lanes<F32>(total + d, fma(dlogit, load_lanes<E>(k + d, m), load_lanes<F32>(total + d, m)), m);
      });
    }
  }
  for_each_vec(row, [=](int64_t i, int m) { store_lanes<E>(dq + i, load_lanes<F32>(dq_first + i, m), m); });
  std::fill(dq + row, dq + x.n * row, T(0));
}

inline float column_share(int64_t heads, int64_t n) {
  return 1.f / (static_cast<float>(heads) * static_cast<float>(n));
}

// Query rows of a block: equal blocks, so that little is padding.
inline int64_t block_rows(int64_t n, int64_t align) {
  const int64_t blocks = (n + kMaxBlock - 1) / kMaxBlock;
  return round_up((n + blocks - 1) / blocks, align);
}

// out (n,): sum over the queries of one head of the attention each key receives. A block's sum is taken on its own and
// then added, which keeps the round-off of n additions that of n / kMaxBlock + kMaxBlock / 4.
template <typename E>
void column_sums(const ScoreTokensParams& p, int64_t image, int64_t head, float* out) {
  const Image<E> x(p, image);
  if (x.n == 0) return;
  const int64_t D = p.head_dim, ld = round_up(x.n, 16), block = block_rows(x.n, 4);
  float* keys = scratch<float, kKeys>(ld * D);
  float* keys_t = scratch<float, kKeysT>(D * ld);
  float* queries = scratch<float, kQueries>(block * D);
  float* S = scratch<float, kLogits>(block * ld);
  float* sums = scratch<float, kFactors>(ld);
  pack_rows_f32<E>(x.k + head * p.k.head_stride, p.k.row_stride, nullptr, 0, x.n, ld, D, 1.f, keys);
  transpose_f32(keys, D, x.n, ld, D, keys_t, ld);
  std::fill(out, out + x.n, 0.f);
  for (int64_t i0 = 0; i0 < x.n; i0 += block) {
    const int64_t rows = std::min(block, x.n - i0);
    pack_rows_f32<E>(x.q + i0 * p.q.row_stride + head * p.q.head_stride, p.q.row_stride, nullptr, 0, rows, block, D,
                     1.f, queries);
    gemm<F32>(block, ld, D, queries, D, keys_t, ld, S, ld, false);
    std::fill(S + rows * ld, S + block * ld, 0.f);
    std::fill(sums, sums + ld, 0.f);
    for (int64_t i = 0; i < rows; i += 4) {  // block % 4 == 0
      float inverse[4] = {};
      for (int64_t r = i; r < std::min(i + 4, rows); ++r) {
        inverse[r - i] = 1.f / softmax_numerators(S + r * ld, x.n, ld, p.scale);
      }
      for (int64_t j = 0; j < ld; j += kWidth) {  // ld % kWidth == 0
        const float* s = S + i * ld + j;
        const Vec first_two = fma(load(s), set(inverse[0]), load(s + ld) * set(inverse[1]));
        const Vec last_two = fma(load(s + 2 * ld), set(inverse[2]), load(s + 3 * ld) * set(inverse[3]));
        store(sums + j, load(sums + j) + (first_two + last_two));
      }
    }
    for (int64_t j = 0; j < x.n; ++j) out[j] += sums[j];
  }
}

// With A recomputed per block of queries: dA_ij = g_j / (H n), dS_ij = scale A_ij (dA_ij - sum_l A_il dA_il),
// dQ = dS K, dK = dS^T Q.
template <typename E>
void column_backward(const ScoreTokensBackwardParams& b, int64_t image, int64_t head) {
  using T = typename E::type;
  const ScoreTokensParams& p = b.forward;
  const Image<E> x(p, image);
  if (x.n == 0) return;
  const int64_t D = p.head_dim, row = p.heads * D, ld = round_up(x.n, 16), block = block_rows(x.n, 16);
  float* keys = scratch<float, kKeys>(ld * D);
  float* keys_t = scratch<float, kKeysT>(D * ld);
  float* queries = scratch<float, kQueries>(block * D);
  float* S = scratch<float, kLogits>(block * ld);
  float* S_t = scratch<float, kLogitsT>(ld * block);
  float* dqueries = scratch<float, kQueryGrad>(block * D);
  float* dkeys = scratch<float, kKeyGrad>(ld * D);
  float* dA = scratch<float, kFactors>(ld);
  pack_rows_f32<E>(x.k + head * p.k.head_stride, p.k.row_stride, nullptr, 0, x.n, ld, D, 1.f, keys);
  transpose_f32(keys, D, x.n, ld, D, keys_t, ld);
  std::fill(dkeys, dkeys + ld * D, 0.f);
  const float share = column_share(p.heads, x.n);
  for (int64_t j = 0; j < x.n; ++j) dA[j] = b.grad[x.begin + j] * share;
  std::fill(dA + x.n, dA + ld, 0.f);

  const auto unpack = [=](const float* rows, int64_t first_row, int64_t count, void* out) {
    for (int64_t i = 0; i < count; ++i) {
      T* to = static_cast<T*>(out) + (x.begin + first_row + i) * row + head * D;
      for_each_vec(D, [=](int64_t d, int m) { store_lanes<E>(to + d, load_lanes<F32>(rows + i * D + d, m), m); });
    }
  };
  for (int64_t i0 = 0; i0 < x.n; i0 += block) {
    const int64_t rows = std::min(block, x.n - i0);
    pack_rows_f32<E>(x.q + i0 * p.q.row_stride + head * p.q.head_stride, p.q.row_stride, nullptr, 0, rows, block, D,
                     1.f, queries);
    gemm<F32>(block, ld, D, queries, D, keys_t, ld, S, ld, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* s = S + i * ld;
      const float inverse = 1.f / softmax_numerators(s, x.n, ld, p.scale);
      const float mean = inverse * sum_over(ld, [=](int64_t j, int m) {
                           return load_lanes<F32>(s + j, m) * load_lanes<F32>(dA + j, m);
                         });
      const Vec factor = set(p.scale * inverse);
      for (int64_t j = 0; j < ld; j += kWidth) store(s + j, load(s + j) * factor * (load(dA + j) - set(mean)));
    }
    std::fill(S + rows * ld, S + block * ld, 0.f);
    gemm<F32>(block, D, ld, S, ld, keys, D, dqueries, D, false);
    transpose_f32(S, ld, block, block, ld, S_t, block);
    gemm<F32>(ld, D, block, S_t, block, queries, D, dkeys, D, true);
    unpack(dqueries, i0, rows, b.dq);
  }
  unpack(dkeys, 0, x.n, b.dk);
}

template <typename E>
void score_image(const ScoreTokensParams& p, int64_t image, float* scores) {
  if (p.kind != ScoreKind::kColumn) return class_scores<E>(p, image, scores);
  const int64_t n = p.batch.cu_seqlens[image + 1] - p.batch.cu_seqlens[image];
  if (n == 0) return;
  float* head_sums = scratch<float, kHeadSums>(p.heads * n);
  for (int64_t h = 0; h < p.heads; ++h) column_sums<E>(p, image, h, head_sums + h * n);
  sum_heads(head_sums, n, p.heads, n, column_share(p.heads, n), scores);
}

}  // namespace scoring

void score_image(const ScoreTokensParams& p, int64_t image, float* scores) {
  visit_dtype(p.dtype, [&](auto e) { scoring::score_image<decltype(e)>(p, image, scores); });
}

// Images, for the class token's scores.
void score_images(const ScoreTokensParams& p, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) score_image(p, b, p.scores + p.batch.cu_seqlens[b]);
}
void score_images_backward(const ScoreTokensBackwardParams& b, int64_t first, int64_t last) {
  visit_dtype(b.forward.dtype, [&](auto e) {
    for (int64_t i = first; i < last; ++i) scoring::class_backward<decltype(e)>(b, i);
  });
}

// Images x heads, for `column`; then its images.
void column_heads(const ScoreTokensParams& p, int64_t first, int64_t last) {
  visit_dtype(p.dtype, [&](auto e) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t image = i / p.heads, head = i % p.heads;
      float* out = p.head_sums + head * p.total + p.batch.cu_seqlens[image];
      scoring::column_sums<decltype(e)>(p, image, head, out);
    }
  });
}
void column_images(const ScoreTokensParams& p, int64_t first, int64_t last) {
  const int32_t* cu = p.batch.cu_seqlens;
  for (int64_t b = first; b < last; ++b) {
    const int64_t n = cu[b + 1] - cu[b];
    scoring::sum_heads(p.head_sums + cu[b], p.total, p.heads, n, scoring::column_share(p.heads, n), p.scores + cu[b]);
  }
}
void column_heads_backward(const ScoreTokensBackwardParams& b, int64_t first, int64_t last) {
  visit_dtype(b.forward.dtype, [&](auto e) {
    for (int64_t i = first; i < last; ++i) {
      scoring::column_backward<decltype(e)>(b, i / b.forward.heads, i % b.forward.heads);
    }
  });
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

constexpr int64_t kGrainElements = 65536;  // elements of K: a few microseconds, what waking a second thread costs

// Images that one thread should have at least.
int64_t image_grain(const ScoreTokensParams& p) {
  const int64_t elements = p.total * p.heads * p.head_dim / std::max<int64_t>(1, p.batch.images);
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
}

void score_images(const ScoreTokensParams& p, int64_t first, int64_t last) {
  SAIT_DISPATCH(score_images, p, first, last);
}
void score_images_backward(const ScoreTokensBackwardParams& b, int64_t first, int64_t last) {
  SAIT_DISPATCH(score_images_backward, b, first, last);
}
void column_heads(const ScoreTokensParams& p, int64_t first, int64_t last) {
  SAIT_DISPATCH(column_heads, p, first, last);
}
void column_images(const ScoreTokensParams& p, int64_t first, int64_t last) {
  SAIT_DISPATCH(column_images, p, first, last);
}
void column_heads_backward(const ScoreTokensBackwardParams& b, int64_t first, int64_t last) {
  SAIT_DISPATCH(column_heads_backward, b, first, last);
}

}  // namespace

void score_image(const ScoreTokensParams& p, int64_t image, float* scores) {
  SAIT_DISPATCH(score_image, p, image, scores);
}

void score_tokens(const ScoreTokensParams& p) {
  const int64_t images = p.batch.images;
  if (p.kind != ScoreKind::kColumn) {
    parallel_for(images, image_grain(p), [&](int64_t first, int64_t last) { score_images(p, first, last); });
    return;
  }
  parallel_for(images * p.heads, 1, [&](int64_t first, int64_t last) { column_heads(p, first, last); });
  column_images(p, 0, images);
}

void score_tokens_backward(const ScoreTokensBackwardParams& b) {
  const int64_t images = b.forward.batch.images;
  if (b.forward.kind != ScoreKind::kColumn) {
    parallel_for(images, 1, [&](int64_t first, int64_t last) { score_images_backward(b, first, last); });
    return;
  }
  parallel_for(images * b.forward.heads, 1,
               [&](int64_t first, int64_t last) { column_heads_backward(b, first, last); });
}

}  // namespace sait::cpu
#endif
