// What score_tokens and prune_attention have in common: which score, and the launch.
#pragma once

#include <string_view>

#include "ops/common.h"
#include "sait/score_tokens.h"

#ifdef SAIT_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace sait {

inline ScoreKind score_kind(const char* op, std::string_view kind, int64_t num_prefix) {
  SAIT_CHECK_VALUE(kind == "cls" || kind == "column" || kind == "cls_value", op, "kind",
                   "one of 'cls', 'column', 'cls_value'", "'" << kind << "'", "Choose one of them.");
  if (kind == "column") return ScoreKind::kColumn;
  SAIT_CHECK_VALUE(num_prefix >= 1, op, "num_prefix",
                   "at least 1 for kind '" << kind << "', which reads the class token", num_prefix,
                   "For a model without a class token use kind='column'.");
  return kind == "cls" ? ScoreKind::kCls : ScoreKind::kClsValue;
}

#ifdef SAIT_WITH_CUDA
// (total,) scores; the rows of params.q, k and v are aligned(). The memory is that of `like`.
inline Tensor scores_cuda(const char* op, ScoreTokensParams params, const Tensor& like) {
  const auto float32 = ScalarType::Float;
  if (params.batch.images == 0 || params.batch.max_seqlen == 0) return allocate_zeros(like, {params.total}, float32);
  const Tensor scores = allocate(like, {params.total}, float32);
  const Tensor scratch = allocate(like, {cuda::scratch_size(params, false)}, float32);
  params.scores = scores.mutable_data_ptr<float>();
  params.head_sums = scratch.mutable_data_ptr<float>();
  launch(op, like, [&](void* stream) { return cuda::score_tokens(params, stream); });
  return scores;
}
#endif

}  // namespace sait
