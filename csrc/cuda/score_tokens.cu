// score_tokens and score_select. The class token's scores take one block per image: it reads K once, eight lanes a row,
// 16 bytes a lane, so that a row of 64 elements of 16 bits is one request of 128 bytes. A thread has 8 loads under way,
// a block 16 KB; two of them, of 256 images on 132 multiprocessors, are what bandwidth x latency asks for (4.3 TB/s x
// 1 us / 132 = 32 KB). Blocks of single heads would keep more multiprocessors busy with few images, but the mean over
// the heads would be a second launch of 2 us, as long as one block takes for the 151 KB of six heads out of the cache.
#include <algorithm>

#include "class_scores.cuh"
#include "keep_rows.cuh"
#include "launch.cuh"
#include "sait/score_tokens.h"
#include "score_columns.cuh"
#include "tail.cuh"

namespace sait::cuda {
namespace {

constexpr int kWarps = kScoreThreads / kWarpSize;
constexpr int kHeadsAtOnce = 2 * kWarps;  // whose softmax the warps take in turn
constexpr int kMostShared = 96 * 1024;  // what every device from sm_80 on has, and two blocks on an H200
constexpr int kStrip = 32;  // rows that a warp reads at a time
constexpr int kStripLoads = kStrip * kPartialSums / kWarpSize;  // of each lane
static_assert(kScoreThreads == kSelectThreads);

struct alignas(16) ClassScratch {
  SumScratch sums;
  KeepScratch keep;
};

// Shared memory, in this order: ClassScratch; the queries of `heads` heads, float32; then rows of `row` floats each:
// one of scores if the kernel selects, one of norms for cls_value, and the logits of `heads` heads. For images that are
// too long for shared memory these rows lie in score.head_sums.
struct ClassParams {
  ScoreTokensParams score;
  KeptRowsParams keep;
  int heads, row;
  bool in_shared;
};

struct ClassLayout {
  int heads, row;
  bool in_shared;
  int shared_bytes;
  int64_t scratch;
};

ClassLayout layout_of(const ScoreTokensParams& p, bool selects) {
  const int64_t longest = std::min(p.batch.max_seqlen, p.total);
  const int64_t others = int64_t{selects} + (p.kind == ScoreKind::kClsValue);  // rows of scores and norms: 0, 1 or 2
  const int64_t query = 4 * p.head_dim;
  const int64_t left = kMostShared - static_cast<int64_t>(sizeof(ClassScratch)) - 4 * others * longest;
  int64_t heads = std::min<int64_t>({p.heads, kHeadsAtOnce, left / (query + 4 * longest)});
  const bool in_shared = heads >= 1;
  if (!in_shared) heads = std::min<int64_t>(p.heads, kWarps);
  const int64_t rows = in_shared ? (others + heads) * longest : 0;
  return {static_cast<int>(heads), static_cast<int>(longest), in_shared,
          static_cast<int>(static_cast<int64_t>(sizeof(ClassScratch)) + heads * query + 4 * rows),
          in_shared ? 0 : (others + heads) * p.total};
}

// Sums over the chunks of rows [first, first + 32), by a warp: lane l gets that of row 4 (l % 8) + l / 8, 0 past row n.
// term(c, chunk, sum) adds what chunk c of a row contributes.
template <typename E, typename Term>
SAIT_DEVICE float strip_sum(const E* rows, int64_t stride, int first, int n, int chunks, Term term) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, group = lane / kPartialSums;
  float sums[kStripLoads] = {};
  for (int c = lane % kPartialSums; c < chunks; c += kPartialSums) {
    uint4 loaded[kStripLoads];
#pragma unroll
    for (int i = 0; i < kStripLoads; ++i) {
      const int row = first + 4 * i + group;
      loaded[i] = row < n ? load_16(rows + row * stride + c * kChunk<E>) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kStripLoads; ++i) sums[i] = term(c, loaded[i], sums[i]);
  }
  float result = 0.f;
#pragma unroll
  for (int i = 0; i < kStripLoads; ++i) {
    const float sum = sum_of_lanes(sums[i]);
    if (lane % kPartialSums == i) result = sum;
  }
  return result;
}

template <typename E, bool kSelects>
__global__ void __launch_bounds__(kScoreThreads, 4) score_images(ClassParams p) {
  const ScoreTokensParams& s = p.score;
  if constexpr (!kSelects) zero_tail(s.scores, s.batch.cu_seqlens[s.batch.images], s.total);
  auto& scratch = *reinterpret_cast<ClassScratch*>(shared_memory());
  auto* queries = reinterpret_cast<float*>(shared_memory() + sizeof(ClassScratch));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int64_t image = kSelects ? image_to_keep(p.keep, scratch.keep) : int64_t{blockIdx.x};
  const int64_t begin = s.batch.cu_seqlens[image];
  const int n = static_cast<int>(s.batch.cu_seqlens[image + 1] - begin);
  const int heads = static_cast<int>(s.heads), head_dim = static_cast<int>(s.head_dim);
  const int chunks = head_dim / kChunk<E>, strips = (n + kStrip - 1) / kStrip;
  const bool values = s.kind == ScoreKind::kClsValue;

  // The two optional rows come first: kSelects and `values`, as 0 or 1, say how many rows to step over.
  const int64_t row = p.in_shared ? p.row : s.total;
  float* rows = p.in_shared ? queries + p.heads * head_dim : s.head_sums + begin;
  float* scores = kSelects ? rows : s.scores + begin;
  float* norms = rows + kSelects * row;
  float* logits = norms + values * row;
  const int strip_row = 4 * (lane % kPartialSums) + lane / kPartialSums;  // of this lane's sum

  const E* q = static_cast<const E*>(s.q.data) + begin * s.q.row_stride;
  const E* k = static_cast<const E*>(s.k.data) + begin * s.k.row_stride;
  for (int first = 0; first < heads && n > 0; first += p.heads) {
    const int count = min(p.heads, heads - first);
    for (int i = thread; i < count * chunks; i += kScoreThreads) {
      const int h = i / chunks, c = i % chunks;
      float x[kChunk<E>];
      widen(load_16(q + (first + h) * s.q.head_stride + c * kChunk<E>), x, E{});
      for (int e = 0; e < kChunk<E>; ++e) queries[h * head_dim + c * kChunk<E> + e] = x[e];
    }
    sync_block();
    for (int i = warp; i < count * strips; i += kWarps) {
      const int h = i / strips, j = i % strips * kStrip;
      const float* query = queries + h * head_dim;
      const float logit = strip_sum(k + (first + h) * s.k.head_stride, s.k.row_stride, j, n, chunks,
                                    [=](int c, uint4 chunk, float sum) { return add_logit<E>(query, c, chunk, sum); });
      if (j + strip_row < n) logits[h * row + j + strip_row] = logit;
    }
    sync_block();
    for (int h = warp; h < count; h += kWarps) softmax_in_place<kWarpSize>(logits + h * row, n, s.scale, nullptr);
    sync_block();
    for (int j = thread; j < n; j += kScoreThreads) {
      float sum = first == 0 ? logits[j] : scores[j] + logits[j];
      for (int h = 1; h < count; ++h) sum += logits[h * row + j];
      scores[j] = first + count == heads && !values ? sum * (1.f / static_cast<float>(heads)) : sum;
    }
    sync_block();
  }

  if (values && n > 0) {
    const E* v = static_cast<const E*>(s.v.data) + begin * s.v.row_stride;
    for (int i = warp; i < strips; i += kWarps) {
      float squares = 0.f;
      for (int h = 0; h < heads; ++h) {
        squares += strip_sum(v + h * s.v.head_stride, s.v.row_stride, i * kStrip, n, chunks,
                             [](int, uint4 chunk, float sum) { return add_squares<E>(chunk, sum); });
      }
      if (i * kStrip + strip_row < n) norms[i * kStrip + strip_row] = sqrtf(squares);
    }
    sync_block();
    for (int j = thread; j < n; j += kScoreThreads) scores[j] *= norms[j];
    share_out(scores, n, static_cast<int>(min(s.num_prefix, int64_t{n})), &scratch.sums);
    sync_block();
  }
  // The logits are not needed any more, and lend their memory to the choice.
  if constexpr (kSelects) keep_rows(p.keep, image, scores, reinterpret_cast<int32_t*>(logits), scratch.keep);
}

template <typename E, bool kSelects>
int launch_class(const ScoreTokensParams& score, const KeptRowsParams& keep, void* stream) {
  const ClassLayout layout = layout_of(score, kSelects);
  return launch(score_images<E, kSelects>,
                {.x = score.batch.images, .threads = kScoreThreads, .shared_bytes = layout.shared_bytes}, stream,
                ClassParams{score, keep, layout.heads, layout.row, layout.in_shared});
}

// visit(E{}) with the element type of `dtype`.
template <typename Visit>
int visit_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(float{});
    case DType::kBFloat16: return visit(__nv_bfloat16{});
    default: return visit(__half{});
  }
}

}  // namespace

int64_t scratch_size(const ScoreTokensParams& params, bool selects) {
  return params.kind == ScoreKind::kColumn ? 2 * params.heads * params.total : layout_of(params, selects).scratch;
}

int score_tokens(const ScoreTokensParams& params, void* stream) {
  return visit_dtype(params.dtype, [&](auto e) {
    using E = decltype(e);
    return params.kind == ScoreKind::kColumn ? launch_columns<E>(params, stream)
                                             : launch_class<E, false>(params, {}, stream);
  });
}

int score_select(const ScoreTokensParams& params, const KeptRowsParams& keep, void* stream) {
  return visit_dtype(params.dtype, [&](auto e) { return launch_class<decltype(e), true>(params, keep, stream); });
}

}  // namespace sait::cuda
