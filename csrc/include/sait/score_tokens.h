// score_tokens: the importance of every row, float32 whatever the input type.
#pragma once

#include "sait/types.h"

namespace sait {

struct ScoreTokensParams {
  HeadView q, k, v;  // v.data is nullptr unless kind is kClsValue
  Batch batch;
  int64_t total, heads, head_dim;
  int64_t num_prefix;
  ScoreKind kind;
  DType dtype;
  float scale;
  float* scores;  // (total,)
};

struct ScoreTokensBackwardParams {
  ScoreTokensParams forward;  // forward.scores is not read
  const float* grad;          // (total,)
  // Contiguous (total, heads, head_dim) of forward.dtype, every element written. dv only for kClsValue.
  void* dq;
  void* dk;
  void* dv;
};

namespace cpu {
void score_tokens(const ScoreTokensParams& params);
void score_tokens_backward(const ScoreTokensBackwardParams& params);
}  // namespace cpu

}  // namespace sait
