// score_tokens with the score `column`: attention received, in two passes over the logits; never N x N in memory.
//
// The first pass leaves two numbers of each query and head, the largest logit and one over the sum of the numerators;
// the second adds up what each key receives, over the queries of one head after the other. A block takes 64 rows, a
// warp 16 of them, and goes through 64 columns at a time, 128 bytes of each row: all of 64 elements of 16 bits, and
// slices of longer ones, so that two tiles are 18 KB whatever the type and the head dimension.
#pragma once

#include <algorithm>

#include "class_scores.cuh"
#include "head_view.cuh"
#include "launch.cuh"
#include "sait/score_tokens.h"
#include "tail.cuh"

namespace sait::cuda {
namespace columns {

constexpr int kTile = 64;
constexpr int kThreads = 2 * kTile;
constexpr int kSliceChunks = 8;                     // of 16 bytes
constexpr int kRowBytes = 16 * (kSliceChunks + 1);  // odd in chunks: eight rows of ldmatrix lie in different banks
constexpr int kTileBytes = kTile * kRowBytes;
constexpr int kPairs = kTile / 8;  // pairs of columns that a lane holds of either of its rows

// The logits of a warp's 16 rows and 64 columns: with g = lane / 4 and t = lane % 4, logit[i][0..1] are row g and
// columns 8 i + 2 t and the next, [2..3] those of row g + 8.
using Logits = float[kPairs][4];

// Rows [first, first + 64) of a head of one image, zeros from row n and from the end of the row on: 128 bytes of each.
template <typename E>
SAIT_DEVICE void load_tile(unsigned char* tile, const E* rows, int64_t stride, int first, int n, int chunk,
                           int chunks) {
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kSliceChunks; i += kThreads) {
    const int row = i / kSliceChunks, c = i % kSliceChunks;
    const bool valid = first + row < n && chunk + c < chunks;
    const E* source = valid ? rows + (first + row) * stride + (chunk + c) * kChunk<E> : rows;
    copy_async_16(tile + row * kRowBytes + 16 * c, source, valid);
  }
}

// logits += a b^T over this slice.
template <typename E>
SAIT_DEVICE void add_slice(Logits& logits, const unsigned char* a_tile, const unsigned char* b_tile, E) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, row = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const int in_matrix = lane % 8, matrix = lane / 8;
  for (int c = 0; c < kSliceChunks; c += 2) {
    uint32_t a[4];
    load_matrices_4(a, a_tile + (row + in_matrix + matrix % 2 * 8) * kRowBytes + 16 * (c + matrix / 2));
#pragma unroll
    for (int i = 0; i < kPairs; i += 2) {
      uint32_t b[4];
      load_matrices_4(b, b_tile + (8 * i + in_matrix + matrix / 2 * 8) * kRowBytes + 16 * (c + matrix % 2));
      multiply_add(logits[i], a, b[0], b[1], E{});
      multiply_add(logits[i + 1], a, b[2], b[3], E{});
    }
  }
}
SAIT_DEVICE void add_slice(Logits& logits, const unsigned char* a_tile, const unsigned char* b_tile, float) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, row = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  const unsigned char* a_row = a_tile + (row + lane / 4) * kRowBytes;
  const unsigned char* b_row = b_tile + lane % 4 * 2 * kRowBytes;
  const auto chunk = [](const unsigned char* address, float (&x)[4]) {
    widen(*reinterpret_cast<const uint4*>(address), x, float{});
  };
  for (int c = 0; c < kSliceChunks; ++c) {
    float a[2][4];
    chunk(a_row + 16 * c, a[0]), chunk(a_row + 8 * kRowBytes + 16 * c, a[1]);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float b[4];
        chunk(b_row + (8 * i + j) * kRowBytes + 16 * c, b);
        logits[i][j] = add_products(a[0], b, logits[i][j]);
        logits[i][2 + j] = add_products(a[1], b, logits[i][2 + j]);
      }
    }
  }
}

// A block's rows, a, against the columns, b, of one head.
template <typename E>
struct TileGemm {
  const E *a, *b;
  int64_t a_stride, b_stride;
  int first, n, chunks;  // the first row; how many rows and columns; 16-byte chunks of a row
  float sign;  // of the scale: multiplied by it, the logit with the greatest exponent is the greatest logit

  // visit(column, logits) for every 64 columns.
  template <typename Visit>
  SAIT_DEVICE void each(unsigned char* shared, Visit visit) const {
    unsigned char *a_tile = shared, *b_tile = shared + kTileBytes;
    for (int column = 0; column < n; column += kTile) {
      Logits logits = {};
      for (int chunk = 0; chunk < chunks; chunk += kSliceChunks) {
        if (column == 0 || chunks > kSliceChunks) load_tile(a_tile, a, a_stride, first, n, chunk, chunks);
        load_tile(b_tile, b, b_stride, column, n, chunk, chunks);
        copies_commit();
        copies_wait<0>();
        sync_block();
        add_slice(logits, a_tile, b_tile, E{});
        sync_block();
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) logits[i][j] *= sign;
      }
      visit(column, logits);
    }
  }
};

// The image, and the first row, of this block.
struct Place {
  int64_t image, begin;
  int n, first;

  SAIT_DEVICE Place(const ScoreTokensParams& p, int blocks)
      : image(blockIdx.x / blocks), begin(p.batch.cu_seqlens[image]) {
    n = static_cast<int>(p.batch.cu_seqlens[image + 1] - begin);
    first = static_cast<int>(blockIdx.x % blocks) * kTile;
  }
};

struct ColumnParams {
  ScoreTokensParams score;  // head_sums: (2, heads, total), the statistics of the rows
  int blocks;  // of an image
};

// Block (rows, head).
template <typename E>
__global__ void __launch_bounds__(kThreads, 4) row_statistics(ColumnParams p) {
  const ScoreTokensParams& s = p.score;
  const Place at(s, p.blocks);
  if (at.first >= at.n) return;
  const int64_t head = blockIdx.y;
  const float sign = s.scale < 0.f ? -1.f : 1.f;
  const Exponent factor(sign * s.scale);
  const TileGemm<E> gemm{row_of<E>(s.q, at.begin, head),
                         row_of<E>(s.k, at.begin, head),
                         s.q.row_stride,
                         s.k.row_stride,
                         at.first,
                         at.n,
                         static_cast<int>(s.head_dim) / kChunk<E>,
                         sign};
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float largest[2] = {kLowest, kLowest}, total[2] = {};  // of rows g and g + 8; the total over this lane's columns
  gemm.each(shared_memory(), [&](int column, const Logits& logits) {
    const auto outside = [&](int i, int j) { return column + 8 * i + lane % 4 * 2 + j >= at.n; };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float larger = largest[r];
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        if (!outside(i / 2, i % 2)) larger = fmaxf(larger, logits[i / 2][2 * r + i % 2]);
      }
      for (int mask = 1; mask < 4; mask *= 2) larger = fmaxf(larger, shuffle_xor(larger, mask));
      const float shift = larger == kLowest ? 0.f : larger;  // nothing yet: -inf weighs 0
      float sum = 0.f;  // on its own: n / 64 roundings of the total, and not n
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        if (!outside(i / 2, i % 2)) sum += softmax_numerator(logits[i / 2][2 * r + i % 2], shift, factor);
      }
      total[r] = column == 0 ? sum : fmaf(total[r], softmax_numerator(largest[r], shift, factor), sum);
      largest[r] = larger;
    }
  });
  for (int r = 0; r < 2; ++r) {
    for (int mask = 1; mask < 4; mask *= 2) total[r] += shuffle_xor(total[r], mask);
    const int row = at.first + static_cast<int>(threadIdx.x) / kWarpSize * 16 + lane / 4 + 8 * r;
    if (lane % 4 != 0 || row >= at.n) continue;
    float* statistics = s.head_sums + head * s.total + at.begin + row;
    statistics[0] = largest[r];
    statistics[s.heads * s.total] = 1.f / total[r];
  }
}

// Block (keys): rows are keys here, and columns are queries.
template <typename E>
__global__ void __launch_bounds__(kThreads, 4) column_sums(ColumnParams p) {
  const ScoreTokensParams& s = p.score;
  zero_tail(s.scores, s.batch.cu_seqlens[s.batch.images], s.total);
  const Place at(s, p.blocks);
  if (at.first >= at.n) return;
  const float sign = s.scale < 0.f ? -1.f : 1.f;
  const Exponent factor(sign * s.scale);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  float total[2] = {};
  for (int64_t head = 0; head < s.heads; ++head) {
    const TileGemm<E> gemm{row_of<E>(s.k, at.begin, head),
                           row_of<E>(s.q, at.begin, head),
                           s.k.row_stride,
                           s.q.row_stride,
                           at.first,
                           at.n,
                           static_cast<int>(s.head_dim) / kChunk<E>,
                           sign};
    const float* largest = s.head_sums + head * s.total + at.begin;
    const float* inverse = largest + s.heads * s.total;
    gemm.each(shared_memory(), [&](int column, const Logits& logits) {
      float sums[2] = {};  // on their own, as above
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const int query = column + 8 * (i / 2) + lane % 4 * 2 + i % 2;
        if (query >= at.n) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float weight = softmax_numerator(logits[i / 2][2 * r + i % 2], largest[query], factor);
          sums[r] = fmaf(weight, inverse[query], sums[r]);
        }
      }
      total[0] += sums[0], total[1] += sums[1];
    });
  }
  for (int r = 0; r < 2; ++r) {
    for (int mask = 1; mask < 4; mask *= 2) total[r] += shuffle_xor(total[r], mask);
    const int row = at.first + static_cast<int>(threadIdx.x) / kWarpSize * 16 + lane / 4 + 8 * r;
    if (lane % 4 == 0 && row < at.n) s.scores[at.begin + row] = total[r] / static_cast<float>(s.heads * at.n);
  }
}

}  // namespace columns

template <typename E>
int launch_columns(const ScoreTokensParams& score, void* stream) {
  using namespace columns;
  const int64_t longest = std::min(score.batch.max_seqlen, score.total), blocks = (longest + kTile - 1) / kTile;
  const ColumnParams params{score, static_cast<int>(blocks)};
  Grid grid{.x = score.batch.images * blocks, .y = score.heads, .threads = kThreads, .shared_bytes = 2 * kTileBytes};
  const int error = launch(row_statistics<E>, grid, stream, params);
  if (error != 0) return error;
  grid.y = 1;
  return launch(column_sums<E>, grid, stream, params);
}

}  // namespace sait::cuda
