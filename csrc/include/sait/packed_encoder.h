// packed_encoder: all blocks of a transformer whose weights are packed. Each is what packed_linear (norm1 and qkv),
// norm_heads, rotate, score_tokens and select, compact_attention and packed_block give one after the other, bit for bit.
#pragma once

#include "sait/packed_linear.h"
#include "sait/select.h"
#include "sait/types.h"

namespace sait {

// Packed weights, and vectors that are nullptr where there is none.
struct EncoderBlock {
  const void *qkv, *proj, *fc1, *fc2;
  const float *norm1_weight, *norm1_bias, *qkv_bias, *proj_bias, *gamma1;
  const float *norm2_weight, *norm2_bias, *fc1_bias, *gate_bias;
  const float *hidden_norm_weight, *hidden_norm_bias, *fc2_bias, *gamma2;
  const float *q_norm_weight, *q_norm_bias, *k_norm_weight, *k_norm_bias;
  const float* table;  // of rotate, or nullptr
  int64_t table_row_stride, table_head_stride;
};

// Rows that are dropped in the attention of a block.
struct EncoderStage {
  int64_t block;
  ScoreKind kind;
  KeepRule rule;
  // The rows that image b keeps, as rows of the batch that entered; from offsets[b] on, with a capacity of
  // offsets[b + 1] - offsets[b].
  const int64_t* offsets;
  int32_t* rows;
  int32_t* lengths;  // (images,), how many
};

struct PackedEncoderParams {
  RowView x;  // (total, channels)
  Batch batch;
  int64_t channels, heads, head_dim, hidden, num_prefix;
  float eps1, eps2, hidden_eps, head_eps, scale;
  Activation activation;
  bool gated;
  const int32_t* positions;  // (total,) of rotate, or nullptr
  int64_t entries;  // rows of each table
  bool pairs;  // what a table turns together
  DType dtype;
  const EncoderBlock* blocks;
  int64_t count;
  const EncoderStage* stages;  // in the order of their blocks
  int64_t stage_count;
  bool prefix_only;  // the last block computes the prefix rows alone
  EncoderStage leaving;  // of that block, then: where its rows are delivered
  // What leaves the last block of image b: from row offsets[b] on, with a capacity of offsets[b + 1] - offsets[b] rows.
  const int64_t* offsets;
  void* out;
  int32_t* lengths;  // (images,), how many rows
};

namespace cpu {
void packed_encoder(const PackedEncoderParams& params);
}  // namespace cpu

}  // namespace sait
