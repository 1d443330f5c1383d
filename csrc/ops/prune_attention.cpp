// prune_attention: score, select and compact_attention as one. Schema, checks, dispatch.
#include "cpu/runtime.h"
#include "ops/compact_attention.h"
#include "ops/score_tokens.h"
#include "ops/select.h"
#include "sait/prune_attention.h"

#include <algorithm>
#include <vector>

namespace sait {
namespace {

#ifdef SAIT_WITH_CUDA
// (indices, cu_seqlens) of the rows that stay: scores and selects, in one launch for the class token's scores. The rows
// of params.q, k and v are aligned().
std::tuple<Tensor, Tensor> kept_rows_cuda(const char* op, ScoreTokensParams params, const KeepRule& rule,
                                          const Tensor& cu_seqlens, bool is_static) {
  const int64_t max_seqlen = params.batch.max_seqlen;
  if (params.kind == ScoreKind::kColumn) {
    return select_cuda(op, scores_cuda(op, params, cu_seqlens), cu_seqlens, max_seqlen, params.num_prefix, rule,
                       is_static);
  }
  const Tensor scratch = allocate(cu_seqlens, {cuda::scratch_size(params, true)}, ScalarType::Float);
  params.head_sums = scratch.mutable_data_ptr<float>();
  return kept_rows_by(
      op, cu_seqlens, max_seqlen, params.total, params.num_prefix, rule, is_static,
      [&](const cuda::KeptRowsParams& keep, void* stream) { return cuda::score_select(params, keep, stream); });
}
#endif

// Scores one image after the other in a scratch row per thread; keep(b, rows, count) takes what image b keeps.
template <typename Keep>
void score_and_select(const ScoreTokensParams& params, const KeepRule& rule, Keep keep) {
  const int32_t* offsets = params.batch.cu_seqlens;
  int64_t longest = 0;  // max_seqlen is a bound only, and may be far above
  for (int64_t b = 0; b < params.batch.images; ++b) longest = std::max<int64_t>(longest, offsets[b + 1] - offsets[b]);
  cpu::parallel_for(params.batch.images, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(longest);
    std::vector<int32_t> rows(longest);
    for (int64_t b = begin; b < end; ++b) {
      cpu::score_image(params, b, scores.data());
      keep(b, rows.data(),
           cpu::select_image(scores.data(), offsets[b], offsets[b + 1], params.num_prefix, rule, rows.data()));
    }
  });
}

// (indices, cu_seqlens) of the rows that stay.
std::tuple<Tensor, Tensor> kept_rows(const char* op, const ScoreTokensParams& params, const KeepRule& rule,
                                     const Tensor& cu_seqlens, bool is_static) {
  const int64_t images = params.batch.images, total = params.total;
  const auto room_for = [&](int64_t kept, bool whole) {
    const int64_t rows = whole ? capacity(params.batch, total, params.num_prefix, rule) : kept;
    return empty_indices(rows, kept, total, cu_seqlens);
  };
  if (rule.mass == 0) {  // known beforehand: each image writes into its place
    Tensor kept_cu = topk_cu_seqlens(op, cu_seqlens, params.num_prefix, rule);
    const int32_t* offsets = kept_cu.const_data_ptr<int32_t>();
    Tensor indices = room_for(offsets[images], is_full(params.batch, total));
    int32_t* out = indices.mutable_data_ptr<int32_t>();
    score_and_select(params, rule, [&](int64_t b, const int32_t* rows, int64_t count) {
      std::copy_n(rows, count, out + offsets[b]);
    });
    return {indices, kept_cu};
  }
  std::vector<std::vector<int32_t>> kept(images);
  score_and_select(params, rule,
                   [&](int64_t b, const int32_t* rows, int64_t count) { kept[b].assign(rows, rows + count); });
  Tensor kept_cu = allocate(cu_seqlens, {images + 1});
  int32_t* offsets = kept_cu.mutable_data_ptr<int32_t>();
  offsets[0] = 0;
  for (int64_t b = 0; b < images; ++b) offsets[b + 1] = offsets[b] + static_cast<int32_t>(kept[b].size());
  Tensor indices = room_for(offsets[images], is_static);
  int32_t* out = indices.mutable_data_ptr<int32_t>();
  for (int64_t b = 0; b < images; ++b) std::copy(kept[b].begin(), kept[b].end(), out + offsets[b]);
  return {indices, kept_cu};
}

#ifdef SAIT_WITH_CUDA
// One launch if the score is `cls`, a rate or a count decides how many rows stay, all images have max_seqlen tokens
// (is_full) and the device has clusters. Else one launch that scores and selects, and one that attends.
std::tuple<Tensor, Tensor, Tensor> prune_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                        const Tensor& cu_seqlens, ScoreTokensParams score,
                                                        const KeepRule& rule, bool is_static) {
  constexpr const char* op = "prune_attention";
  check_cuda_attention(op, q);
  const Tensor queries = aligned(q), keys = aligned(k), values = aligned(v);
  score.q = head_view(queries), score.k = head_view(keys), score.v = head_view(values);
  const Batch& batch = score.batch;
  const int64_t width = q.size(1) * q.size(2);
  const auto empty = [&](int64_t size) { return allocate(cu_seqlens, {size}); };
  if (score.total > 0 && is_full(batch, score.total) && rule.mass == 0 && score.kind == ScoreKind::kCls) {
    const int64_t patches = batch.max_seqlen - std::min(score.num_prefix, batch.max_seqlen);
    const int64_t rows = batch.max_seqlen - patches + checked_patches(op, rule, patches, 0);
    PruneAttentionParams params{score.q,        score.k,          score.v, batch,   score.heads,
                                score.head_dim, score.num_prefix, rule,    rows,    score.total,
                                score.dtype,    score.scale,      nullptr, nullptr, nullptr};
    if (on_device_of(op, q, [&] { return cuda::prunes_in_one_launch(params); })) {
      const Tensor out = allocate(q, {batch.images * rows, width});
      const Tensor indices = empty(batch.images * rows), kept_cu = empty(batch.images + 1);
      params.out = out.mutable_data_ptr();
      params.indices = indices.mutable_data_ptr<int32_t>();
      params.kept_cu_seqlens = kept_cu.mutable_data_ptr<int32_t>();
      launch(op, q, [&](void* stream) { return cuda::prune_attention(params, stream); });
      return {out, indices, kept_cu};
    }
  }
  const auto [indices, kept_cu] = kept_rows_cuda(op, score, rule, cu_seqlens, is_static);
  const Tensor out = allocate(q, {indices.size(0), width});
  const Kept kept{indices.const_data_ptr<int32_t>(), kept_cu.const_data_ptr<int32_t>(), indices.size(0)};
  const CompactAttentionParams params =
      attention_params(queries, keys, values, cu_seqlens, batch.max_seqlen, kept, score.scale, out.mutable_data_ptr());
  launch(op, q, [&](void* stream) { return cuda::compact_attention(params, stream); });
  return {out, indices, kept_cu};
}
#endif

struct Checked {
  ScoreTokensParams score;
  KeepRule rule;
};

Checked check_prune_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                              int64_t max_seqlen, std::optional<double> rate, std::optional<int64_t> count,
                              std::optional<double> mass, std::string_view kind, int64_t num_prefix,
                              std::optional<double> scale, int64_t min_keep, std::optional<int64_t> max_keep,
                              bool is_static) {
  constexpr const char* op = "prune_attention";
  const double factor = check_attention(op, q, k, v, cu_seqlens, max_seqlen, num_prefix, scale);
  SAIT_CHECK_VALUE(!mass || !(rate || count), op, "mass", "either keep or mass", "both", "Pass one of them.");
  SAIT_CHECK_VALUE(mass || (min_keep == 1 && !max_keep && !is_static), op, "mass",
                   "a mass, with min_keep, max_keep or static", "None", "Pass one, or keep alone.");
  const KeepRule rule = mass ? mass_rule(op, *mass, min_keep, max_keep) : topk_rule(op, rate, count);
  return {
      {head_view(q), head_view(k), head_view(v), batch_view(cu_seqlens, max_seqlen), q.size(0), q.size(1), q.size(2),
       num_prefix, score_kind(op, kind, num_prefix), dtype_of(q), static_cast<float>(factor), nullptr, nullptr},
      rule};
}

std::tuple<Tensor, Tensor, Tensor> prune_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   const Tensor& cu_seqlens, int64_t max_seqlen,
                                                   std::optional<double> rate, std::optional<int64_t> count,
                                                   std::optional<double> mass, std::string_view kind,
                                                   int64_t num_prefix, std::optional<double> scale, int64_t min_keep,
                                                   std::optional<int64_t> max_keep, bool is_static) {
  const auto [score, rule] = check_prune_attention(q, k, v, cu_seqlens, max_seqlen, rate, count, mass, kind, num_prefix,
                                                   scale, min_keep, max_keep, is_static);
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(q)) return prune_attention_cuda(q, k, v, cu_seqlens, score, rule, is_static);
#endif
  auto [indices, kept_cu] = kept_rows("prune_attention", score, rule, cu_seqlens, is_static);
  Tensor out = allocate(q, {indices.size(0), q.size(1) * q.size(2)});
  const Kept kept{indices.const_data_ptr<int32_t>(), kept_cu.const_data_ptr<int32_t>(), indices.size(0)};
  cpu::compact_attention(attention_params(q, k, v, cu_seqlens, max_seqlen, kept, score.scale, out.mutable_data_ptr()));
  zero_tail(out, kept.cu_seqlens[score.batch.images]);
  return {out, indices, kept_cu};
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "prune_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float? rate=None, "
      "SymInt? count=None, float? mass=None, str kind=\"cls\", int num_prefix=1, float? scale=None, SymInt min_keep=1, "
      "SymInt? max_keep=None, bool static=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_check_prune_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float? rate=None, "
      "int? count=None, float? mass=None, str kind=\"cls\", int num_prefix=1, float? scale=None, int min_keep=1, "
      "int? max_keep=None, bool static=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("prune_attention", sait::boxed<sait::prune_attention>); }

#ifdef SAIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sait, CUDA, m) { m.impl("prune_attention", sait::boxed<sait::prune_attention>); }
#endif

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_prune_attention", sait::boxed_checks<sait::check_prune_attention>);
}
