// gather_add_norm: residual[t] = x[indices[t]] + gamma * y[t];  normed[t] = LayerNorm(residual[t]) * weight + bias.
#pragma once

#include "sait/types.h"

namespace sait {

// Vector: what weight, bias and gamma hold; void where that is said apart.
template <typename Vector>
struct GatherAddNormParamsOf {
  RowView x;  // (total, channels)
  RowView y;  // (rows, channels)
  const int32_t* indices;
  const Vector* weight;  // (channels,)
  const Vector* bias;    // (channels,)
  const Vector* gamma;   // (channels,) or nullptr
  int64_t rows, total, channels;
  float eps;
  DType dtype;
  void* residual;  // (rows, channels), contiguous
  void* normed;    // (rows, channels), contiguous
};
using GatherAddNormParams = GatherAddNormParamsOf<float>;

// The gradients of weight, bias and gamma are sums over rows: first over chunks of this many rows in float, then over
// the chunks in their order in double, so that the result does not depend on the number of threads.
constexpr int64_t kGatherAddNormChunk = 32;

struct GatherAddNormBackwardParams {
  RowView residual;       // (rows, channels), the forward result
  RowView y;              // (rows, channels), read only with gamma
  RowView grad_residual;  // (rows, channels)
  RowView grad_normed;    // (rows, channels)
  const float* weight;
  const float* gamma;
  int64_t rows, channels;
  float eps;
  DType dtype;
  void* dresidual;  // (rows, channels), contiguous: the gradient of the kept rows of x
  void* dy;         // (rows, channels), contiguous; nullptr without gamma, since it equals dresidual
  float* dweight;   // (channels,)
  float* dbias;     // (channels,)
  float* dgamma;    // (channels,); nullptr without gamma
  float* partials;  // (ceil(rows / kGatherAddNormChunk), 3, channels) of scratch
};

namespace cpu {
void gather_add_norm(const GatherAddNormParams& params);
void gather_add_norm_backward(const GatherAddNormBackwardParams& params);
}  // namespace cpu

namespace cuda {
// weight, bias and gamma are all of dtype `vectors`: float32, or that of the rows.
// Launches on stream (a cudaStream_t); returns a cudaError_t as int.
int gather_add_norm(const GatherAddNormParamsOf<void>& params, DType vectors, void* stream);
}  // namespace cuda

}  // namespace sait
