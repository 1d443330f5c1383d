// Attention of 16 query rows, one warp, over keys and values in shared memory: what compact_attention and
// prune_attention have in common.
//
// Keys are taken in chunks of 48, always from the image's first row on, with a running (online) softmax. So the bits of
// a row depend on its image alone, whether the keys lie in shared memory all at once or pass through it. A whole row of
// logits in registers (197 keys: 104 of them) would need no running softmax, but fewer warps would fit on an SM; 48
// keys are 24 registers. The tensor cores are the limit: 8 keys take 8 multiply_adds, about 50 cycles of a quarter SM.
// The exponentials (32 cycles of a unit of their own) and some 30 other instructions hide behind them.
//
// Full chunks have code of their own: six independent chains of multiply_adds and not a branch, 245 instructions at
// D = 64. The rest of an image, and images of few tokens, go through the code for any number of keys, with 385. Both do
// the same to each number in the same order, and neither has a multiplication that the compiler could fuse with an
// addition in one and not in the other: the bits are the same.
//
// wgmma would be faster for each GEMM, but takes 64 rows at once: it would compute 256 rows for 197, and 128 for the 90
// that stay. And there is little to gain: at 197 tokens reading q, k, v and writing the result takes an H200 36 us for
// 256 images, these GEMMs about 34.
#pragma once

#include <cfloat>
#include <iterator>
#include <type_traits>
#include <utility>

#include "head_view.cuh"
#include "instructions.cuh"
#include "sait/compact_attention.h"

namespace sait::cuda {

// An image of at most this many tokens has no more than two full chunks.
constexpr int kFewTokens = 112;

template <typename Element_, int kHeadDim_, bool kFullChunks_>
struct AttentionTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kFullChunks = kFullChunks_;  // whether chunks of kKeys keys have code of their own
  static constexpr int kKeys = 48;  // of a chunk
  static constexpr int kSteps = (kHeadDim + 15) / 16;  // multiply_adds over the head dimension
  static constexpr int kTiles = kHeadDim / 8;  // multiply_adds over the columns of the output
  static constexpr int kColumns = 16 * kSteps;  // of a row in shared memory: zeros behind the head dimension
  static constexpr int kStride = kColumns + 8;  // of a row there
  static constexpr int kRowBytes = 2 * kStride;
  // Blocks of 128 threads on an SM: as many as leave registers enough for no spill. At D = 64 full chunks take 139.
  static constexpr int kBlocks = kHeadDim <= (kFullChunks ? 32 : 64) ? 4 : kHeadDim <= 96 ? 3 : 2;
  static_assert(sizeof(Element) == 2 && kHeadDim % 8 == 0);
  // Eight rows at an odd multiple of 16 bytes lie in eight different groups of banks: load_matrices takes them at once.
  static_assert(kRowBytes % 32 == 16);
};

// A warp's 16 query rows, and what it knows of them after some keys. Lane l holds rows l / 4 and l / 4 + 8.
template <typename Traits>
struct RowBlock {
  uint32_t query[Traits::kSteps][4];
  float sums[Traits::kTiles][4];  // of weight times value
  float largest[2];  // logit so far
  float total[2];  // of the weights, this lane's columns only
};

// Four lanes hold four words each: lane t gets word t of every lane, in their order.
SAIT_DEVICE void transpose_in_quad(uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = shuffle_xor(odd ? words[i] : words[i + 1], 1);
    (odd ? words[i] : words[i + 1]) = received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t received = shuffle_xor(upper ? words[i] : words[i + 2], 2);
    (upper ? words[i] : words[i + 2]) = received;
  }
}

// The weights are exp2(factor * logit - largest) with factor > 0. A negative scale turns the signs of the queries. For
// a scale of 0 a tiny factor takes its place: all logits then weigh the same, and keys beyond the image, whose logits
// are -inf, still weigh nothing (0 * -inf would be NaN).
SAIT_DEVICE float weight_factor(float scale) { return fmaxf(fabsf(scale) * 1.44269504f, FLT_MIN); }

// Loads the queries of kept rows [first, first + 16) of `count`, 16 bytes a lane; rows from `count` on are zeros.
// Kept row i is row kept_rows[i] of q; row i itself if kept_rows is nullptr.
template <typename Traits>
SAIT_DEVICE void load_queries(RowBlock<Traits>& rows, const typename Traits::Element* q, int64_t row_stride,
                              const int32_t* kept_rows, int first, int count, float scale) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t sign = scale < 0 ? 0x80008000u : 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = first + lane / 4 + 8 * half;
    const typename Traits::Element* row = nullptr;
    if (i < count) row = q + (kept_rows == nullptr ? i : kept_rows[i]) * row_stride;
#pragma unroll
    for (int step = 0; step < Traits::kSteps; step += 2) {  // 32 columns: this lane loads 8, and gets 2 of each 8
      const int column = 16 * step + 8 * (lane % 4);
      uint32_t words[4] = {};
      if (row != nullptr && column < Traits::kHeadDim) {
        const uint4 loaded = load_16(row + column);
        words[0] = loaded.x ^ sign, words[1] = loaded.y ^ sign, words[2] = loaded.z ^ sign, words[3] = loaded.w ^ sign;
      }
      transpose_in_quad(words);
      rows.query[step][half] = words[0];
      rows.query[step][half + 2] = words[1];
      if (step + 1 < Traits::kSteps) {
        rows.query[step + 1][half] = words[2];
        rows.query[step + 1][half + 2] = words[3];
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < Traits::kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows.sums[tile][i] = 0;
  }
  rows.largest[0] = rows.largest[1] = -INFINITY;
  rows.total[0] = rows.total[1] = 0;
}

// Copies n rows of a head, and zeros behind them up to a multiple of 16, into shared memory; without waiting for them.
template <typename Traits, int kThreads>
SAIT_DEVICE void copy_rows(typename Traits::Element* shared, const typename Traits::Element* global, int64_t row_stride,
                           int n) {
  constexpr int kPieces = Traits::kColumns / 8;  // of 16 bytes
  const int pieces = (n + 15) / 16 * 16 * kPieces;
  for (int i = threadIdx.x; i < pieces; i += kThreads) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool valid = row < n && column < Traits::kHeadDim;
    copy_async_16(shared + row * Traits::kStride + column, valid ? global + row * row_stride + column : global, valid);
  }
}

// Updates the running softmax and sums by one chunk of n keys and values: n == kKeys if kFull, else n <= kKeys.
// copy_rows has padded the rows with zeros to a multiple of 16, so all that is read is finite. In a full chunk the loop
// over the head dimension is the outer one, over the six tiles of logits the inner one: between two multiply_adds of
// the same tile there are five that do not depend on it.
template <bool kFull, typename Traits>
SAIT_DEVICE void attend(RowBlock<Traits>& rows, const typename Traits::Element* keys,
                        const typename Traits::Element* values, int n, float factor) {
  constexpr int kTiles = Traits::kKeys / 8;
  const typename Traits::Element tag{};
  const int lane = threadIdx.x % kWarpSize;
  float logits[kTiles][4] = {};
  // Matrices: 8 keys by 8 columns, the next 8 columns, then the same of the next 8 keys.
  const auto* key = keys + (lane / 16 * 8 + lane % 8) * Traits::kStride + lane / 8 % 2 * 8;
  const auto multiply = [&](int j, int step) {
    uint32_t b[4];
    load_matrices_4(b, key + 8 * j * Traits::kStride + 16 * step);
    multiply_add(logits[j], rows.query[step], b[0], b[1], tag);
    multiply_add(logits[j + 1], rows.query[step], b[2], b[3], tag);
  };
  if constexpr (kFull) {
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) multiply(j, step);
    }
  }
  float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    if (!kFull && 8 * j >= n) continue;
    if constexpr (!kFull) {
#pragma unroll
      for (int step = 0; step < Traits::kSteps; ++step) multiply(j, step);
    }
#pragma unroll
    for (int tile = j; tile < j + 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!kFull && 8 * j + 16 > n && 8 * tile + 2 * (lane % 4) + i % 2 >= n) logits[tile][i] = -INFINITY;
        largest[i / 2] = fmaxf(largest[i / 2], logits[tile][i]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    largest[half] = fmaxf(largest[half], shuffle_xor(largest[half], 1));
    largest[half] = fmaxf(largest[half], shuffle_xor(largest[half], 2));
    largest[half] = fmaxf(rows.largest[half], largest[half] * factor);
    const float shrunk = exp2_fast(rows.largest[half] - largest[half]);
    rows.largest[half] = largest[half];
    rows.total[half] = rounded_product(rows.total[half], shrunk);
#pragma unroll
    for (int tile = 0; tile < Traits::kTiles; ++tile) {
      rows.sums[tile][2 * half] *= shrunk;
      rows.sums[tile][2 * half + 1] *= shrunk;
    }
  }

#pragma unroll
  for (int j = 0; j < kTiles; j += 2) {
    if (!kFull && 8 * j >= n) continue;
#pragma unroll
    for (int tile = j; tile < j + 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[tile][i] = exp2_fast(fmaf(logits[tile][i], factor, -largest[i / 2]));
        rows.total[i / 2] += logits[tile][i];
      }
    }
    const uint32_t weights[4] = {pack(logits[j][0], logits[j][1], tag), pack(logits[j][2], logits[j][3], tag),
                                 pack(logits[j + 1][0], logits[j + 1][1], tag),
                                 pack(logits[j + 1][2], logits[j + 1][3], tag)};
    // Matrices: 8 values by 8 columns, the next 8 values, then the same of the next 8 columns; transposed.
    const auto* value = values + (8 * j + lane / 8 % 2 * 8 + lane % 8) * Traits::kStride + lane / 16 * 8;
#pragma unroll
    for (int tile = 0; tile < Traits::kTiles; tile += 2) {
      uint32_t b[4];
      load_matrices_4_transposed(b, value + 8 * tile);
      multiply_add(rows.sums[tile], weights, b[0], b[1], tag);
      if (tile + 1 < Traits::kTiles) multiply_add(rows.sums[tile + 1], weights, b[2], b[3], tag);
    }
  }
}

// Writes the rows of load_queries to rows `first` and on of out, 16 bytes a lane.
template <typename Traits>
SAIT_DEVICE void store_rows(const RowBlock<Traits>& rows, typename Traits::Element* out, int64_t row_stride, int first,
                            int count) {
  const typename Traits::Element tag{};
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = rows.total[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const float inverse = 1 / total;
    const int i = first + lane / 4 + 8 * half;
#pragma unroll
    for (int tile = 0; tile < Traits::kTiles; tile += 4) {  // 32 columns: this lane has 2 of each 8, and stores 8
      uint32_t words[4] = {};
#pragma unroll
      for (int w = 0; w < 4 && tile + w < Traits::kTiles; ++w) {
        const float (&sums)[4] = rows.sums[tile + w];
        words[w] = pack(sums[2 * half] * inverse, sums[2 * half + 1] * inverse, tag);
      }
      transpose_in_quad(words);
      const int column = 8 * (tile + lane % 4);
      if (i < count && column < Traits::kHeadDim) {
        store_16(out + i * row_stride + column, {words[0], words[1], words[2], words[3]});
      }
    }
  }
}

// Attention of the kept rows of one head of an image, 16 rows a warp at a time. Keys and values are all `tokens` rows
// that copy_rows was asked for and that were committed. `q` and kept_rows are as for load_queries; kept row i is
// written to out + i * out_stride.
//
// 197 rows are 13 times 16, so one of the four warps has 4 turns and the others 3; and each warp runs on its own
// quarter of the SM. Which warp has the extra turn changes from block to block, by the golden ratio. A plain block
// number modulo 4 would give all blocks of an SM (every 132nd, on an H100) the same warp.
template <typename Traits, int kThreads>
SAIT_DEVICE void attend_all(const typename Traits::Element* keys, const typename Traits::Element* values, int tokens,
                            const typename Traits::Element* q, int64_t q_stride, const int32_t* kept_rows, int kept,
                            typename Traits::Element* out, int64_t out_stride, float scale) {
  constexpr int kWarps = kThreads / kWarpSize, kRows = 16 * kWarps;
  static_assert(kWarps == 4);
  const float factor = weight_factor(scale);
  const unsigned turn = blockIdx.x * 0x9e3779b9u >> 30;
  int first = static_cast<int>((threadIdx.x / kWarpSize + turn) % kWarps) * 16;
  RowBlock<Traits> rows;
  load_queries(rows, q, q_stride, kept_rows, first, kept, scale);  // these come while the keys do
  copies_wait<0>();
  sync_block();
#pragma unroll 1
  while (first < kept) {
    const auto attend_from = [&](int key, auto full) {
      attend<full>(rows, keys + key * Traits::kStride, values + key * Traits::kStride, min(tokens - key, Traits::kKeys),
                   factor);
    };
    int key = 0;
    if constexpr (Traits::kFullChunks) {
#pragma unroll 1
      for (; key + Traits::kKeys <= tokens; key += Traits::kKeys) attend_from(key, std::true_type{});
      if (key < tokens) attend_from(key, std::false_type{});
    } else {
#pragma unroll 1
      for (; key < tokens; key += Traits::kKeys) attend_from(key, std::false_type{});
    }
    store_rows(rows, out, out_stride, first, kept);
    first += kRows;
    if (first < kept) load_queries(rows, q, q_stride, kept_rows, first, kept, scale);
  }
}

// Calls run(AttentionTraits{}) for the dtype, the head dimension and the longest image; cudaErrorInvalidValue if no
// kernel is built for them. At D = 64 the code for full chunks takes so many registers that a fourth block does not fit
// on an SM. Images of few tokens leave shared memory for a fourth block, so they do without that code.
template <typename Element, size_t... i, typename Run>
int with_head_dim(int64_t head_dim, int64_t longest, std::index_sequence<i...>, Run run) {
  int result = cudaErrorInvalidValue;
  const auto found = [&](auto few, auto many) {
    result = longest <= kFewTokens ? run(few) : run(many);
    return true;
  };
  (void)((head_dim == kHeadDims[i] && found(AttentionTraits<Element, kHeadDims[i], kHeadDims[i] != 64>{},
                                            AttentionTraits<Element, kHeadDims[i], true>{})) ||
         ...);
  return result;
}

template <typename Run>
int with_attention_traits(DType dtype, int64_t head_dim, int64_t longest, Run run) {
  constexpr auto dims = std::make_index_sequence<std::size(kHeadDims)>{};
  switch (dtype) {
    case DType::kBFloat16: return with_head_dim<__nv_bfloat16>(head_dim, longest, dims, run);
    case DType::kFloat16: return with_head_dim<__half>(head_dim, longest, dims, run);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace sait::cuda
