// gather_tokens and scatter_tokens: move whole rows; indices (S,) are rows of the T axis, or T for no row.
#pragma once

#include "sait/types.h"

namespace sait {

// out[i] = x[indices[i]]; zeros for no row.
struct GatherTokensParams {
  const void* x;  // (total, channels), rows contiguous
  void* out;      // (rows, channels), contiguous
  const int32_t* indices;
  int64_t rows;
  int64_t total;
  int64_t row_bytes;         // channels * element size
  int64_t x_row_stride;      // bytes
};

// out[indices[i]] = y[i]; every other row is base's, or zero without a base.
struct ScatterTokensParams {
  const void* y;     // (rows, channels)
  const void* base;  // (total, channels) or nullptr
  void* out;         // (total, channels), contiguous
  const int32_t* indices;
  int64_t rows;
  int64_t total;
  int64_t row_bytes;
  int64_t y_row_stride;     // bytes
  int64_t base_row_stride;  // bytes
};

namespace cpu {
void gather_tokens(const GatherTokensParams& params);
void scatter_tokens(const ScatterTokensParams& params);
}  // namespace cpu

namespace cuda {
// Launches on stream (a cudaStream_t); returns a cudaError_t as int.
int gather_tokens(const GatherTokensParams& params, void* stream);
int scatter_tokens(const ScatterTokensParams& params, void* stream);
}  // namespace cuda

}  // namespace sait
