// rotate: out = x * cos + turned(x) * sin for the rows of q and k that have a position; the others are copied.
//
// With (x1, x2) what turns together and w = (-sin1, sin2): out = (x1 * cos1 + x2 * w1, x2 * cos2 + x1 * w2). The
// gradient is the transpose of that, which is the same with w = (sin2, -sin1).
#pragma once

#include "sait/types.h"

namespace sait {

struct RotateParams {
  HeadView q, k;             // (rows, heads, head_dim)
  const int32_t* positions;  // (rows,): rows of the table; one outside [0, entries), as -1 is, is no position
  const float* table;        // (entries, 2 head_dim), sin then cos; strides are in elements
  int64_t table_row_stride;
  int64_t table_head_stride;  // 0: one table for all heads
  int64_t rows, heads, head_dim, entries;
  bool pairs;       // neighbours turn together, else the halves of a head
  bool transposed;  // the gradient
  DType dtype;
  void* q_out;  // (rows, heads, head_dim), contiguous
  void* k_out;  // (rows, heads, head_dim), contiguous
};

namespace cpu {
void rotate(const RotateParams& params);
}  // namespace cpu

namespace cuda {
// Launches on stream (a cudaStream_t); returns a cudaError_t as int.
int rotate(const RotateParams& params, void* stream);
}  // namespace cuda

}  // namespace sait
