// Arguments that score_tokens, select_topk, select_mass and prune_attention have in common: kind, keep, mass.
#pragma once

#include <algorithm>
#include <optional>
#include <string_view>

#include "ops/common.h"
#include "sait/select.h"

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

inline KeepRule topk_rule(const char* op, std::optional<double> rate, std::optional<int64_t> count) {
  constexpr const char* cure = "Pass a share such as 0.45, or a whole number of patches.";
  SAIT_CHECK_VALUE(rate.has_value() != count.has_value(), op, "keep", "exactly one of a share and a number of patches",
                   (rate ? "both" : "neither"), cure);
  SAIT_CHECK_VALUE(!rate || (*rate > 0 && *rate <= 1), op, "keep", "a share in (0, 1]", *rate, cure);
  SAIT_CHECK_VALUE(!count || *count >= 1, op, "keep", "a number of patches >= 1", *count, cure);
  return {rate.value_or(0), count.value_or(0), 0, 1, -1};
}

inline KeepRule mass_rule(const char* op, double mass, int64_t min_keep, std::optional<int64_t> max_keep) {
  SAIT_CHECK_VALUE(mass > 0 && mass <= 1, op, "mass", "a number in (0, 1]", mass, "Pass a share such as 0.9.");
  SAIT_CHECK_VALUE(min_keep >= 1, op, "min_keep", "a whole number >= 1", min_keep, "At least one patch stays.");
  SAIT_CHECK_VALUE(!max_keep || *max_keep >= min_keep, op, "max_keep", "at least min_keep = " << min_keep, *max_keep,
                   "Raise it, or pass None for no limit.");
  return {0, 0, mass, min_keep, max_keep.value_or(-1)};
}

// Where each image starts among the rows that a rate or a count keeps: (images + 1,) int32. cu_seqlens on the CPU.
inline at::Tensor topk_cu_seqlens(const char* op, const at::Tensor& cu_seqlens, int64_t num_prefix,
                                  const KeepRule& rule) {
  at::Tensor kept = at::empty(cu_seqlens.sizes(), cu_seqlens.options());
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  int32_t* offsets = kept.mutable_data_ptr<int32_t>();
  offsets[0] = 0;
  for (int64_t b = 0; b + 1 < cu_seqlens.size(0); ++b) {
    const int64_t n = cu[b + 1] - cu[b], patches = n - std::min(num_prefix, n);
    const int64_t k = patches > 0 ? cpu::topk_patches(rule, patches) : 0;
    SAIT_CHECK_VALUE(k <= patches, op, "keep", "at most " << patches << ", the patches of image " << b, k,
                     "Pass a share such as 0.45, or a smaller number.");
    offsets[b + 1] = static_cast<int32_t>(offsets[b] + n - patches + k);
  }
  return kept;
}

// Whether all images have max_seqlen tokens, as far as the number of rows can tell: some may end in the tail.
inline bool is_full(const Batch& batch, int64_t total) {
  return batch.images > 0 && total % batch.images == 0 && total / batch.images == batch.max_seqlen;
}

// The rows that stay at most, whatever the lengths and the scores.
inline int64_t capacity(const Batch& batch, int64_t total, int64_t num_prefix, const KeepRule& rule) {
  const int64_t longest = std::min(batch.max_seqlen, total), patches = longest - std::min(num_prefix, longest);
  const int64_t most = rule.mass == 0 ? cpu::topk_patches(rule, patches) : rule.max_keep < 0 ? patches : rule.max_keep;
  return std::min(total, batch.images * (longest - patches + std::min(most, patches)));
}

// Indices of which the first `kept` are to be written; the others are `total`, which is no row. On the CPU.
inline at::Tensor empty_indices(int64_t rows, int64_t kept, int64_t total, const at::Tensor& cu_seqlens) {
  at::Tensor indices = at::empty({rows}, cu_seqlens.options());
  int32_t* out = indices.mutable_data_ptr<int32_t>();
  std::fill(out + kept, out + rows, static_cast<int32_t>(total));
  return indices;
}

}  // namespace sait
