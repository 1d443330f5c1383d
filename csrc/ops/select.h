// What select_topk, select_mass and prune_attention have in common: the rule, the capacity for the rows that stay, the
// launch.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "ops/common.h"
#include "sait/select.h"

#ifdef SAIT_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace sait {

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

// How many patches of an image a rate or a count keeps; an error if the image has fewer.
inline int64_t checked_patches(const char* op, const KeepRule& rule, int64_t patches, int64_t image) {
  const int64_t k = patches > 0 ? cpu::topk_patches(rule, patches) : 0;
  SAIT_CHECK_VALUE(k <= patches, op, "keep", "at most " << patches << ", the patches of image " << image, k,
                   "Pass a share such as 0.45, or a smaller number.");
  return k;
}

// (images + 1,) int32: where each image starts among the rows that a rate or a count keeps. Takes cu_seqlens on the
// CPU.
inline Tensor topk_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t num_prefix, const KeepRule& rule) {
  Tensor kept = allocate_like(cu_seqlens);
  const int32_t* cu = cu_seqlens.const_data_ptr<int32_t>();
  int32_t* offsets = kept.mutable_data_ptr<int32_t>();
  offsets[0] = 0;
  for (int64_t b = 0; b + 1 < cu_seqlens.size(0); ++b) {
    const int64_t n = cu[b + 1] - cu[b], patches = n - std::min(num_prefix, n);
    offsets[b + 1] = static_cast<int32_t>(offsets[b] + n - patches + checked_patches(op, rule, patches, b));
  }
  return kept;
}

// Whether the batch has images * max_seqlen rows. Then every image has max_seqlen tokens, unless some are shorter and
// rows of no image follow behind the last one (the tail): that shows in cu_seqlens alone, which is not read here.
inline bool is_full(const Batch& batch, int64_t total) {
  return batch.images > 0 && total % batch.images == 0 && total / batch.images == batch.max_seqlen;
}

// A bound on the rows that stay, whatever the lengths and the scores.
inline int64_t capacity(const Batch& batch, int64_t total, int64_t num_prefix, const KeepRule& rule) {
  const int64_t longest = std::min(batch.max_seqlen, total), patches = longest - std::min(num_prefix, longest);
  const int64_t most = rule.mass == 0 ? cpu::topk_patches(rule, patches) : rule.max_keep < 0 ? patches : rule.max_keep;
  return std::min(total, batch.images * (longest - patches + std::min(most, patches)));
}

// (rows,) indices on the CPU. The caller writes the first `kept`; the others are `total`, which means "no row".
inline Tensor empty_indices(int64_t rows, int64_t kept, int64_t total, const Tensor& cu_seqlens) {
  Tensor indices = allocate(cu_seqlens, {rows});
  int32_t* out = indices.mutable_data_ptr<int32_t>();
  std::fill(out + kept, out + rows, static_cast<int32_t>(total));
  return indices;
}

#ifdef SAIT_WITH_CUDA
// (indices, cu_seqlens) of the rows that stay. run(KeptRowsParams, stream) launches a kernel that ends in keep_rows.
// With a rate or a count and images * max_seqlen rows (is_full), or with a static mass, the size of the result is known
// beforehand and nothing synchronises. Else one copy to the host reads the number of kept rows and the flag "too few
// patches".
template <typename Run>
std::tuple<Tensor, Tensor> kept_rows_by(const char* op, const Tensor& cu_seqlens, int64_t max_seqlen, int64_t total,
                                        int64_t num_prefix, const KeepRule& rule, bool is_static, Run run) {
  const int64_t images = cu_seqlens.size(0) - 1;
  const auto empty = [&](int64_t size) { return allocate(cu_seqlens, {size}); };
  if (total == 0 || images == 0) return {empty(0), allocate_zeros(cu_seqlens, {images + 1})};
  const Batch given = batch_view(cu_seqlens, max_seqlen), batch = batch_view(cu_seqlens, std::min(max_seqlen, total));
  const int64_t prefix = std::min(num_prefix, total);
  const bool known = rule.mass == 0 && is_full(given, total);
  int64_t rows = 0;
  if (known) {
    const int64_t patches = batch.max_seqlen - std::min(prefix, batch.max_seqlen);
    rows = batch.max_seqlen - patches + checked_patches(op, rule, patches, 0);
  }
  const int64_t size = known ? images * rows : is_static ? capacity(batch, total, prefix, rule) : total;
  const Tensor indices = empty(size);
  const Tensor kept = known ? empty(images + 1) : allocate_zeros(cu_seqlens, {cuda::kept_size(images)});
  const Tensor spread = empty(!known && batch.max_seqlen > cuda::kMostRowsInShared ? total : 0);
  const cuda::KeptRowsParams params{nullptr,
                                    batch,
                                    prefix,
                                    rule,
                                    rows,
                                    total,
                                    indices.mutable_data_ptr<int32_t>(),
                                    size,
                                    known || is_static,
                                    kept.mutable_data_ptr<int32_t>(),
                                    spread.numel() > 0 ? spread.mutable_data_ptr<int32_t>() : nullptr};
  launch(op, cu_seqlens, [&](void* stream) { return run(params, stream); });
  const Tensor kept_cu = first(kept, images + 1);
  if (known || is_static) return {indices, kept_cu};
  const Tensor read = on_cpu(kept);
  const int32_t* sizes = read.const_data_ptr<int32_t>() + images;
  if (sizes[1] != 0) topk_cu_seqlens(op, on_cpu(cu_seqlens), num_prefix, rule);  // raises, with the image's number
  return {first(indices, sizes[0]), kept_cu};
}

inline std::tuple<Tensor, Tensor> select_cuda(const char* op, const Tensor& scores, const Tensor& cu_seqlens,
                                              int64_t max_seqlen, int64_t num_prefix, const KeepRule& rule,
                                              bool is_static) {
  const Contiguous contiguous(scores, ScalarType::Float);
  return kept_rows_by(op, cu_seqlens, max_seqlen, scores.size(0), num_prefix, rule, is_static,
                      [&](cuda::KeptRowsParams params, void* stream) {
                        params.scores = contiguous.data<float>();
                        return cuda::select(params, stream);
                      });
}
#endif

}  // namespace sait
