// compact_attention: kept query rows over all rows of their image. Two kernels, equal to the last bit: short images have
// all keys and values of a head in shared memory, longer ones pass them through it.
#include <algorithm>

#include "attention.cuh"
#include "launch.cuh"
#include "tail.cuh"

namespace sait::cuda {
namespace {

// Three blocks of an SM's 227 KB: 197 tokens of D = 64 take 60 KB.
constexpr int kResidentBytes = 75 * 1024;

template <typename Traits>
struct Head {
  using Element = typename Traits::Element;
  const Element *q, *k, *v;
  Element* out;  // from the image's first kept row on
  const int32_t* kept_rows;
  int64_t out_stride;
  int tokens, kept;

  SAIT_DEVICE Head(const CompactAttentionParams& p, int64_t block) {
    const int64_t image = block / p.heads, head = block % p.heads;
    const int64_t begin = p.batch.cu_seqlens[image], first = p.kept.cu_seqlens[image];
    tokens = static_cast<int>(p.batch.cu_seqlens[image + 1] - begin);
    kept = static_cast<int>(p.kept.cu_seqlens[image + 1] - first);
    const bool gathers = p.kept.indices != nullptr;
    kept_rows = gathers ? p.kept.indices + first : nullptr;
    q = row_of<Element>(p.q, gathers ? 0 : begin, head);
    k = row_of<Element>(p.k, begin, head);
    v = row_of<Element>(p.v, begin, head);
    out_stride = p.heads * Traits::kHeadDim;
    out = static_cast<Element*>(p.out) + first * out_stride + head * Traits::kHeadDim;
  }
};

template <typename Traits>
SAIT_DEVICE void zero_rows_of_no_image(const CompactAttentionParams& p) {
  const int64_t pieces = p.heads * Traits::kHeadDim / 8;  // of a row, 16 bytes each
  zero_tail(static_cast<uint4*>(p.out), p.kept.cu_seqlens[p.batch.images] * pieces, p.kept.rows * pieces);
}

// Block (image, head): four warps take the kept rows of the image, 16 at a time, in turn.
constexpr int kResidentThreads = 128;

template <typename Traits>
__global__ void __launch_bounds__(kResidentThreads, Traits::kBlocks) attend_resident(const CompactAttentionParams p) {
  zero_rows_of_no_image<Traits>(p);
  const Head<Traits> head(p, blockIdx.x);
  if (head.kept == 0) return;
  auto* keys = reinterpret_cast<typename Traits::Element*>(shared_memory());
  auto* values = keys + (head.tokens + 15) / 16 * 16 * Traits::kStride;
  copy_rows<Traits, kResidentThreads>(keys, head.k, p.k.row_stride, head.tokens);
  copy_rows<Traits, kResidentThreads>(values, head.v, p.v.row_stride, head.tokens);
  copies_commit();
  attend_all<Traits, kResidentThreads>(keys, values, head.tokens, head.q, p.q.row_stride, head.kept_rows, head.kept,
                                       head.out, head.out_stride, p.scale);
}

// Block (image and head, 128 kept rows): eight warps of 16 rows; the next keys and values come while these are used.
constexpr int kStreamingThreads = 256;
constexpr int kStreamingRows = kStreamingThreads / 2;

template <typename Traits>
__global__ void __launch_bounds__(kStreamingThreads, Traits::kHeadDim <= 64 ? 2 : 1)
    attend_streaming(const CompactAttentionParams p) {
  zero_rows_of_no_image<Traits>(p);
  Head<Traits> head(p, blockIdx.x);
  const int start = static_cast<int>(blockIdx.y) * kStreamingRows;
  if (start >= head.kept) return;
  constexpr int kBuffer = Traits::kKeys * Traits::kStride;
  auto* shared = reinterpret_cast<typename Traits::Element*>(shared_memory());  // [2][keys, values]
  auto *current = shared, *next = shared + 2 * kBuffer;
  const auto copy = [&](auto* buffer, int n) {
    copy_rows<Traits, kStreamingThreads>(buffer, head.k, p.k.row_stride, n);
    copy_rows<Traits, kStreamingThreads>(buffer + kBuffer, head.v, p.v.row_stride, n);
    copies_commit();
    head.k += Traits::kKeys * p.k.row_stride;
    head.v += Traits::kKeys * p.v.row_stride;
  };
  copy(current, min(head.tokens, Traits::kKeys));

  const float factor = weight_factor(p.scale);
  const int first = start + 16 * (threadIdx.x / kWarpSize);
  RowBlock<Traits> rows;
  load_queries(rows, head.q, p.q.row_stride, head.kept_rows, first, head.kept, p.scale);
  int left = head.tokens;
#pragma unroll 1
  for (; left >= Traits::kKeys; left -= Traits::kKeys) {
    copies_wait<0>();
    sync_block();  // the copy is there for all, and all are done with what the next one overwrites
    if (left > Traits::kKeys) copy(next, min(left - Traits::kKeys, Traits::kKeys));
    if (first < head.kept) attend<true>(rows, current, current + kBuffer, Traits::kKeys, factor);
    auto* const used = current;
    current = next;
    next = used;
  }
  if (left > 0) {
    copies_wait<0>();
    sync_block();
    if (first < head.kept) attend<false>(rows, current, current + kBuffer, left, factor);
  }
  // Computed a second time: kept through the loop it would spill, as 16 warps on an SM leave 128 registers a thread.
  const Head<Traits> end(p, blockIdx.x);
  if (first < end.kept) store_rows(rows, end.out, end.out_stride, first, end.kept);
}

}  // namespace

int compact_attention(const CompactAttentionParams& params, void* stream) {
  if (params.kept.rows == 0) return cudaSuccess;
  const int64_t longest = std::min(params.batch.max_seqlen, params.total), blocks = params.batch.images * params.heads;
  return with_attention_traits(params.dtype, params.head_dim, longest, [&](auto traits) {
    using Traits = decltype(traits);
    const int64_t bytes = 2 * ((longest + 15) / 16 * 16) * Traits::kRowBytes;
    static_assert(Traits::kFullChunks || 2 * kFewTokens * Traits::kRowBytes <= kResidentBytes);
    if constexpr (Traits::kFullChunks) {
      if (bytes > kResidentBytes) {
        const int64_t most = std::min(longest, params.kept.rows);
        const Grid grid{.x = blocks,
                        .y = (most + kStreamingRows - 1) / kStreamingRows,
                        .threads = kStreamingThreads,
                        .shared_bytes = 4 * Traits::kKeys * Traits::kRowBytes};
        return launch(attend_streaming<Traits>, grid, stream, params);
      }
    }
    const Grid grid{.x = blocks, .threads = kResidentThreads, .shared_bytes = static_cast<int>(bytes)};
    return launch(attend_resident<Traits>, grid, stream, params);
  });
}

}  // namespace sait::cuda
