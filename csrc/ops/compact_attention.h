// Checks and parameters that compact_attention shares with prune_attention.
#pragma once

#include <algorithm>
#include <iterator>

#include "ops/common.h"
#include "sait/compact_attention.h"

#ifdef SAIT_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace sait {

// q, k, v, cu_seqlens, max_seqlen and scale of an attention op.
inline double check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& cu_seqlens, int64_t max_seqlen, int64_t num_prefix,
                              std::optional<double> scale) {
  check_heads(op, "q", q);
  check_qkv_like(op, "k", k, q);
  check_qkv_like(op, "v", v, q);
  check_cu_seqlens(op, "cu_seqlens", cu_seqlens, q, q.size(0), max_seqlen, num_prefix);
  return check_scale(op, scale, q.size(2));
}

inline CompactAttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& cu_seqlens, int64_t max_seqlen, const Kept& kept,
                                               double scale, void* out) {
  return {head_view(q), head_view(k), head_view(v), batch_view(cu_seqlens, max_seqlen), kept, q.size(0),
          q.size(1),    q.size(2),    dtype_of(q),  static_cast<float>(scale),          out};
}

#ifdef SAIT_WITH_CUDA
// What compact_attention and prune_attention have no CUDA kernel for is served by Triton, as backend.py decides.
inline void check_cuda_attention(const char* op, const Tensor& q) {
  SAIT_CHECK_TYPE(q.scalar_type() != ScalarType::Float, op, "q", "bfloat16 or float16 for the CUDA kernel",
                  q.scalar_type(), "Use the triton backend, or convert it.");
  const auto* end = std::end(cuda::kHeadDims);
  SAIT_CHECK_VALUE(std::find(std::begin(cuda::kHeadDims), end, q.size(2)) != end, op, "q",
                   "a head dimension of 32, 64, 72, 80, 96 or 128 for the CUDA kernel", q.size(2),
                   "Use the triton backend.");
}
#endif

}  // namespace sait
