// prune_attention in one launch, for devices with clusters of blocks.
//
// A block takes one head of an image, and the heads of an image are a cluster. Each block scores the keys against its
// head's class query while the values are still loading, and reads the other heads' scores from their shared memory.
// All of them make the same choice from the mean, and each computes the attention of the kept rows: keys and values
// still lie in its shared memory. So keys and values are read once, and nothing of a row that is dropped is computed or
// written. At 197 tokens of D = 64 a block has 63 KB of shared memory, and three of them fit on an SM.
#include "sait/prune_attention.h"

#include "attention.cuh"
#include "class_scores.cuh"
#include "keep_rows.cuh"
#include "launch.cuh"
#include "tail.cuh"

namespace sait::cuda {
namespace {

constexpr int kThreads = kScoreThreads;
constexpr int kMostHeads = 16;  // of a cluster, on a device that has them beyond 8
// Shared memory of a block with which two fit on an SM. For images that need more, two launches (score and select, then
// attend) keep more warps at work.
constexpr int kMostSharedBytes = 113 * 1024;

// A block's shared memory, in this order; every part starts at a multiple of 16 bytes.
template <typename Traits>
struct Layout {
  using Element = typename Traits::Element;
  int keys, values, query, logits, scores, kept, sums, keeping, bytes;

  __host__ SAIT_DEVICE explicit Layout(int tokens) {
    const int matrix = (tokens + 15) / 16 * 16 * Traits::kRowBytes, vector = (tokens + 3) / 4 * 16;
    keys = 0;
    values = keys + matrix;
    query = values + matrix;
    logits = query + 4 * Traits::kHeadDim;
    scores = logits + vector;
    kept = scores + vector;
    sums = kept + vector;
    keeping = sums + static_cast<int>(sizeof(SumScratch));
    bytes = keeping + static_cast<int>(sizeof(KeepScratch));
  }
};
static_assert(sizeof(SumScratch) % 16 == 0 && kThreads == kSelectThreads);

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocks) prune(const PruneAttentionParams p) {
#if SAIT_HAS_CLUSTERS
  using Element = typename Traits::Element;
  const int heads = static_cast<int>(p.heads), head = cluster_rank();
  const int64_t image = blockIdx.x / heads, begin = p.batch.cu_seqlens[image];
  const int tokens = static_cast<int>(p.batch.cu_seqlens[image + 1] - begin);
  const Layout<Traits> layout(static_cast<int>(p.batch.max_seqlen));
  unsigned char* memory = shared_memory();
  auto* keys = reinterpret_cast<Element*>(memory + layout.keys);
  auto* values = reinterpret_cast<Element*>(memory + layout.values);
  auto* query = reinterpret_cast<float*>(memory + layout.query);
  auto* logits = reinterpret_cast<float*>(memory + layout.logits);
  auto* scores = reinterpret_cast<float*>(memory + layout.scores);
  auto* kept = reinterpret_cast<int32_t*>(memory + layout.kept);
  auto* sums = reinterpret_cast<SumScratch*>(memory + layout.sums);
  auto* scratch = reinterpret_cast<KeepScratch*>(memory + layout.keeping);

  copy_rows<Traits, kThreads>(keys, row_of<Element>(p.k, begin, head), p.k.row_stride, tokens);
  copies_commit();
  copy_rows<Traits, kThreads>(values, row_of<Element>(p.v, begin, head), p.v.row_stride, tokens);
  copies_commit();
  for (int i = threadIdx.x; tokens > 0 && i < Traits::kHeadDim / 8; i += kThreads) {
    float numbers[8];
    widen(load_16(row_of<Element>(p.q, begin, head) + 8 * i), numbers, Element{});
    for (int j = 0; j < 8; ++j) query[8 * i + j] = numbers[j];
  }
  copies_wait<1>();
  sync_block();

  for (int j = threadIdx.x; j < tokens; j += kThreads) {
    const Element* key = keys + j * Traits::kStride;
    logits[j] = class_logit<Element>(query, Traits::kHeadDim,
                                     [&](int c) { return *reinterpret_cast<const uint4*>(key + 8 * c); });
  }
  sync_block();
  softmax_in_place<kThreads>(logits, tokens, p.scale, sums);
  cluster_arrive();
  cluster_wait();
  for (int j = threadIdx.x; j < tokens; j += kThreads) {
    float sum = 0;
    for (int h = 0; h < heads; ++h) sum += in_block(logits, h)[j];
    scores[j] = sum * (1.f / static_cast<float>(heads));
  }
  // This block will not read the others' shared memory any more: that is what they wait for (cluster_wait) before they
  // exit. A relaxed arrive, without a fence, is enough. None of this block's writes has to be visible by then, and its
  // reads are complete: each sum that needed them was stored above, and a thread issues its instructions in order.
  cluster_arrive_relaxed();
  sync_block();

  const int num_prefix = static_cast<int>(min(p.num_prefix, int64_t{tokens}));
  const int count = select_rows<kThreads>(scores, tokens, num_prefix, rule_for(p.rule, tokens - num_prefix),
                                          static_cast<int32_t>(begin), scratch->select, kept);
  const int start = rows_before(p.batch, p.num_prefix, p.rule, p.rows, image, *scratch);
  sync_block();
  if (head == 0) {
    for (int i = threadIdx.x; i < count; i += kThreads) p.indices[start + i] = kept[i];
    if (threadIdx.x == 0) {
      if (image == 0) p.kept_cu_seqlens[0] = 0;
      p.kept_cu_seqlens[image + 1] = start + count;
    }
  }
  const int64_t out_stride = p.heads * Traits::kHeadDim;
  auto* out = static_cast<Element*>(p.out) + start * out_stride + head * Traits::kHeadDim;
  attend_all<Traits, kThreads>(keys, values, tokens, row_of<Element>(p.q, 0, head), p.q.row_stride, kept, count, out,
                               out_stride, p.scale);

  if (p.batch.cu_seqlens[p.batch.images] < p.total) {
    const int64_t end = rows_before(p.batch, p.num_prefix, p.rule, p.rows, p.batch.images, *scratch);
    const int64_t size = p.batch.images * p.rows, pieces = out_stride / 8;
    zero_tail(static_cast<uint4*>(p.out), end * pieces, size * pieces);
    if (blockIdx.x == 0) fill_with_no_row(p.indices, end, size, p.total);
  }
  cluster_wait();
#else
  trap();  // never reached: prunes_in_one_launch refuses such a device
#endif
}

template <typename Traits>
Grid grid_of(const PruneAttentionParams& params) {
  return {.x = params.batch.images * params.heads,
          .threads = kThreads,
          .shared_bytes = Layout<Traits>(static_cast<int>(params.batch.max_seqlen)).bytes,
          .cluster = static_cast<int>(params.heads)};
}

}  // namespace

bool prunes_in_one_launch(const PruneAttentionParams& params) {
  if (params.rule.mass > 0 || params.batch.max_seqlen < 1 || params.heads > kMostHeads) return false;
  return with_attention_traits(params.dtype, params.head_dim, params.batch.max_seqlen, [&](auto traits) {
           using Traits = decltype(traits);
           // Compared before the layout is made of it, whose numbers are ints.
           if (params.batch.max_seqlen > kMostSharedBytes / (2 * Traits::kRowBytes)) return 1;
           const Grid grid = grid_of<Traits>(params);
           return grid.shared_bytes <= kMostSharedBytes && runs_clusters(prune<Traits>, grid) ? 0 : 1;
         }) == 0;
}

int prune_attention(const PruneAttentionParams& params, void* stream) {
  return with_attention_traits(params.dtype, params.head_dim, params.batch.max_seqlen, [&](auto traits) {
    using Traits = decltype(traits);
    return launch(prune<Traits>, grid_of<Traits>(params), stream, params);
  });
}

}  // namespace sait::cuda
