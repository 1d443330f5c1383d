// score_tokens: the importance of every row, float32 whatever the input type.
#pragma once

#include "sait/select.h"
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
  float* head_sums;  // scratch: on the CPU (heads, total) for kColumn, else nullptr; on CUDA as scratch_size says
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

namespace cuda {
// Floats of scratch that score_tokens or score_select need.
int64_t scratch_size(const ScoreTokensParams& params, bool selects);

// On stream (a cudaStream_t); a cudaError_t as int. All rows have to start at multiples of 16 bytes.
int score_tokens(const ScoreTokensParams& params, void* stream);

// score_tokens and select in one launch, for the class token's scores. params.scores is not used.
int score_select(const ScoreTokensParams& params, const KeptRowsParams& keep, void* stream);
}  // namespace cuda

}  // namespace sait
