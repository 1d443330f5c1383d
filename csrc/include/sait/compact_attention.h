// compact_attention: attention of the kept query rows over all rows of their image, written compacted.
#pragma once

#include "sait/types.h"

namespace sait {

struct CompactAttentionParams {
  HeadView q, k, v;
  Batch batch;
  Kept kept;
  int64_t total, heads, head_dim;
  DType dtype;
  float scale;
  void* out;  // (kept.rows, heads * head_dim), contiguous
  const float* key_bias = nullptr;  // (total,), contiguous: added to each logit of a key; nullptr: none
};

struct CompactAttentionBackwardParams {
  CompactAttentionParams forward;  // forward.out is not read: P is computed again
  HeadView grad_out;               // (kept.rows, heads, head_dim)
  // Contiguous (total, heads, head_dim) of forward.dtype, every element written.
  void* dq;
  void* dk;
  void* dv;
  // With forward.key_bias: its gradient (total,), written for the rows of images, and scratch for each head's part of
  // it.
  float* dkey_bias = nullptr;
  float* head_sums = nullptr;  // (heads, total)
};

namespace cpu {
void compact_attention(const CompactAttentionParams& params);
void compact_attention_backward(const CompactAttentionBackwardParams& params);
}  // namespace cpu

namespace cuda {
// What the kernels of compact_attention and prune_attention are compiled for, beside bfloat16 and float16.
constexpr int64_t kHeadDims[] = {32, 64, 72, 80, 96, 128};

// Rows and heads of q, k and v have to start at multiples of 16 bytes.
// Launches on stream (a cudaStream_t); returns a cudaError_t as int.
int compact_attention(const CompactAttentionParams& params, void* stream);
}  // namespace cuda

}  // namespace sait
