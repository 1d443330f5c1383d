// norm_heads: LayerNorm of each head of each row.
#pragma once

#include "sait/types.h"

namespace sait {

struct NormHeadsParams {
  HeadView x;           // (rows, heads, head_dim)
  const float* weight;  // (head_dim,)
  const float* bias;    // (head_dim,)
  float eps;
  int64_t rows, heads, head_dim;
  DType dtype;
  void* out;  // (rows, heads, head_dim), contiguous
};

namespace cpu {
void norm_heads(const NormHeadsParams& params);
}  // namespace cpu

}  // namespace sait
