// prune_attention: score, select and compact_attention as one. Schema, checks, dispatch.
#include "cpu/runtime.h"
#include "ops/compact_attention.h"
#include "ops/score_tokens.h"
#include "ops/select.h"
#include "sait/score_tokens.h"
#include "sait/select.h"

#include <algorithm>
#include <vector>

namespace sait {
namespace {

// (indices, cu_seqlens) of the rows that stay. Scores live in one scratch row per thread; nothing has T entries.
std::tuple<at::Tensor, at::Tensor> score_and_select(const char* op, const ScoreTokensParams& params,
                                                    const KeepRule& rule, const at::Tensor& cu_seqlens) {
  const int64_t images = params.batch.images;
  const int32_t* offsets = params.batch.cu_seqlens;
  std::vector<std::vector<int32_t>> kept(images);
  cpu::parallel_for(images, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(params.batch.max_seqlen);
    std::vector<int32_t> rows(params.batch.max_seqlen);
    for (int64_t b = begin; b < end; ++b) {
      cpu::score_image(params, b, scores.data());
      const int64_t count =
          cpu::select_image(scores.data(), offsets[b], offsets[b + 1], params.num_prefix, rule, rows.data());
      kept[b].assign(rows.begin(), rows.begin() + count);
    }
  });
  at::Tensor kept_cu = at::empty({images + 1}, cu_seqlens.options());
  int32_t* kept_offsets = kept_cu.mutable_data_ptr<int32_t>();
  kept_offsets[0] = 0;
  for (int64_t b = 0; b < images; ++b) kept_offsets[b + 1] = kept_offsets[b] + static_cast<int32_t>(kept[b].size());
  at::Tensor indices = at::empty({kept_offsets[images]}, cu_seqlens.options());
  int32_t* out = indices.mutable_data_ptr<int32_t>();
  for (int64_t b = 0; b < images; ++b) std::copy(kept[b].begin(), kept[b].end(), out + kept_offsets[b]);
  return {indices, kept_cu};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> prune_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens, int64_t max_seqlen,
    std::optional<double> keep_rate, std::optional<int64_t> keep_count, std::optional<double> mass, c10::string_view kind,
    int64_t num_prefix, std::optional<double> scale) {
  constexpr const char* op = "prune_attention";
  const double factor = check_attention(op, q, k, v, cu_seqlens, max_seqlen, num_prefix, scale);
  const ScoreKind score_kind = check_score_kind(op, kind, num_prefix);
  const KeepRule rule = check_keep_rule(op, cu_seqlens, num_prefix, keep_rate, keep_count, mass);
  const ScoreTokensParams params{head_view(q),
                                 head_view(k),
                                 head_view(v),
                                 batch_view(cu_seqlens, max_seqlen),
                                 q.size(0),
                                 q.size(1),
                                 q.size(2),
                                 num_prefix,
                                 score_kind,
                                 dtype_of(q),
                                 static_cast<float>(factor),
                                 nullptr};
  auto [indices, kept_cu] = score_and_select(op, params, rule, cu_seqlens);
  at::Tensor out = at::empty({indices.size(0), q.size(1) * q.size(2)}, q.options());
  const Kept kept{indices.const_data_ptr<int32_t>(), kept_cu.const_data_ptr<int32_t>(), indices.size(0)};
  cpu::compact_attention(attention_params(q, k, v, cu_seqlens, max_seqlen, kept, factor, out.mutable_data_ptr()));
  return {out, indices, kept_cu};
}

}  // namespace
}  // namespace sait

TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "prune_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float? keep_rate=None, "
      "SymInt? keep_count=None, float? mass=None, str kind=\"cls\", int num_prefix=1, float? scale=None) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("prune_attention", sait::prune_attention); }
