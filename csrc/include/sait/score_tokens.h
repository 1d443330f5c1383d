// score_tokens: the importance of every row, float32 whatever the input type.
#pragma once

#include "sait/types.h"

namespace sait {

struct ScoreTokensParams {
  HeadView q, k, v;  // v is read only for kClsValue
  Batch batch;
  int64_t total, heads, head_dim;
  int64_t num_prefix;
  ScoreKind kind;
  DType dtype;
  float scale;
  float* scores;    // (total,)
  float* head_sums;  // (heads, total) of scratch for kColumn; else nullptr
};

struct ScoreTokensBackwardParams {
  ScoreTokensParams forward;  // forward.scores and forward.head_sums are not used
  const float* grad;          // (total,)
  // Contiguous (total, heads, head_dim) of forward.dtype, every element written. dv only for kClsValue.
  void* dq;
  void* dk;
  void* dv;
};

namespace cpu {
void score_tokens(const ScoreTokensParams& params);
void score_tokens_backward(const ScoreTokensBackwardParams& params);

// The scores (n,) of one image, the same to the last bit, on the calling thread. params.scores and params.head_sums are
// not used.
void score_image(const ScoreTokensParams& params, int64_t image, float* scores);
}  // namespace cpu

}  // namespace sait
