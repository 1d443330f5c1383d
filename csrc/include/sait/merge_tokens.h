// merge_tokens: out[s] = sum over {t : target[t] = s} of weight[t] * x[t], in float32, t ascending.
#pragma once

#include "sait/types.h"

namespace sait {

struct MergeTokensParams {
  RowView x;              // (rows, channels)
  const int32_t* target;  // (rows,): the row of out that each row goes into, or -1 for none
  const float* weight;    // (rows,)
  int64_t rows, total, channels;
  DType dtype;
  void* out;  // (total, channels), contiguous
};

// dx[t] = weight[t] * grad[target[t]] and dweight[t] = x[t] . grad[target[t]]; zeros where target is -1.
struct MergeTokensBackwardParams {
  RowView grad;  // (any, channels)
  RowView x;     // (rows, channels); no data: dweight is not asked for
  const int32_t* target;
  const float* weight;
  int64_t rows, channels;
  DType dtype;
  void* dx;        // (rows, channels), contiguous
  float* dweight;  // (rows,); nullptr without x
};

namespace cpu {
void merge_tokens(const MergeTokensParams& params);
void merge_tokens_backward(const MergeTokensBackwardParams& params);
}  // namespace cpu

}  // namespace sait
