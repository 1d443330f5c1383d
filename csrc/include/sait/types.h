// Plain types that every kernel shares, on the CPU and on CUDA. No torch header here.
#pragma once

#include <cstdint>

namespace sait {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// A (T, H, D) view, last dimension contiguous. Strides are in elements.
struct HeadView {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// A (T, C) matrix, rows contiguous. The stride is in elements.
struct RowView {
  const void* data;
  int64_t row_stride;
};

// The packed batch: image b owns rows [cu_seqlens[b], cu_seqlens[b + 1]). Rows behind those of the last image, the tail,
// belong to none: what an op writes there is zero. csrc/ops sees to that for the CPU, whose kernels write images only.
struct Batch {
  const int32_t* cu_seqlens;  // (images + 1,)
  int64_t images;
  int64_t max_seqlen;
};

// Rows that stay. indices == nullptr: all rows stay and cu_seqlens is the batch's own.
struct Kept {
  const int32_t* indices;  // (rows,), ascending; from cu_seqlens[images] on the number of the batch's rows: no row
  const int32_t* cu_seqlens;  // (images + 1,)
  int64_t rows;
};

enum class ScoreKind : int32_t { kCls, kColumn, kClsValue };

}  // namespace sait
