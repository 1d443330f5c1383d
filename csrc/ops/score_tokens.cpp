// score_tokens: schema, checks, dispatch.
#include "ops/score_tokens.h"

namespace sait {
namespace {

// Everything but the outputs.
ScoreTokensParams checked_params(const char* op, const Tensor& q, const Tensor& k, const OptionalTensor& v,
                                 const Tensor& cu_seqlens, int64_t max_seqlen, std::string_view kind_name,
                                 int64_t num_prefix, std::optional<double> scale) {
  check_heads(op, "q", q);
  check_qkv_like(op, "k", k, q);
  if (v) check_qkv_like(op, "v", *v, q);
  check_cu_seqlens(op, "cu_seqlens", cu_seqlens, q, q.size(0), max_seqlen, num_prefix);
  const ScoreKind kind = score_kind(op, kind_name, num_prefix);
  SAIT_CHECK_VALUE(v || kind != ScoreKind::kClsValue, op, "v", "the values, which kind 'cls_value' weighs by", "None",
                   "Pass v=.");
  const HeadView values = kind == ScoreKind::kClsValue ? head_view(*v) : HeadView{nullptr, 0, 0};
  return {head_view(q),
          head_view(k),
          values,
          batch_view(cu_seqlens, max_seqlen),
          q.size(0),
          q.size(1),
          q.size(2),
          num_prefix,
          kind,
          dtype_of(q),
          static_cast<float>(check_scale(op, scale, q.size(2))),
          nullptr,
          nullptr};
}

ScoreTokensParams check_score_tokens(const Tensor& q, const Tensor& k, const OptionalTensor& v,
                                     const Tensor& cu_seqlens, int64_t max_seqlen, std::string_view kind,
                                     int64_t num_prefix, std::optional<double> scale) {
  return checked_params("score_tokens", q, k, v, cu_seqlens, max_seqlen, kind, num_prefix, scale);
}

Tensor score_tokens(const Tensor& q, const Tensor& k, const OptionalTensor& v, const Tensor& cu_seqlens,
                    int64_t max_seqlen, std::string_view kind, int64_t num_prefix, std::optional<double> scale) {
  ScoreTokensParams params = check_score_tokens(q, k, v, cu_seqlens, max_seqlen, kind, num_prefix, scale);
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(q)) {
    const Tensor queries = aligned(q), keys = aligned(k), values = params.v.data == nullptr ? keys : aligned(*v);
    params.q = head_view(queries), params.k = head_view(keys), params.v = head_view(values);
    return scores_cuda("score_tokens", params, q);
  }
#endif
  const Tensor scores = allocate(q, {params.total}, ScalarType::Float);
  OptionalTensor head_sums;
  params.scores = scores.mutable_data_ptr<float>();
  if (params.kind == ScoreKind::kColumn) {
    head_sums = allocate(q, {params.heads, params.total}, ScalarType::Float);
    params.head_sums = head_sums->mutable_data_ptr<float>();
  }
  cpu::score_tokens(params);
  zero_tail(scores, params.batch.cu_seqlens[params.batch.images]);
  return scores;
}

std::tuple<Tensor, Tensor, Tensor> score_tokens_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                         const OptionalTensor& v, const Tensor& cu_seqlens,
                                                         int64_t max_seqlen, std::string_view kind, int64_t num_prefix,
                                                         std::optional<double> scale) {
  constexpr const char* op = "score_tokens_backward";
  const ScoreTokensParams params = checked_params(op, q, k, v, cu_seqlens, max_seqlen, kind, num_prefix, scale);
  SAIT_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == q.size(0), op, "grad", "shape (" << q.size(0) << ",)",
                   shape_of(grad), "It is the gradient of the scores.");
  check_device(op, "grad", grad, "q", q);
  SAIT_CHECK_TYPE(grad.scalar_type() == ScalarType::Float, op, "grad", "dtype Float (float32)", grad.scalar_type(),
                  "Convert with .float().");
  SAIT_CHECK_VALUE(grad.is_contiguous(), op, "grad", "a contiguous tensor", "stride " << grad.stride(0),
                   "Call .contiguous() on it.");
  const Tensor dq = allocate_like(q), dk = allocate_like(q);
  // v was given, but this score does not read it: zeros.
  const Tensor dv = params.kind == ScoreKind::kClsValue ? allocate_like(q)
                    : v                                 ? allocate_zeros(q, q.sizes())
                                                        : allocate(q, {0});
  cpu::score_tokens_backward(
      {params, grad.const_data_ptr<float>(), dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr()});
  for (const Tensor& t : {dq, dk, dv}) zero_tail(t, params.batch.cu_seqlens[params.batch.images]);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "score_tokens(Tensor q, Tensor k, Tensor? v, Tensor cu_seqlens, SymInt max_seqlen, str kind, SymInt num_prefix, "
      "float? scale) -> Tensor");
  m.def(
      "score_tokens_backward(Tensor grad, Tensor q, Tensor k, Tensor? v, Tensor cu_seqlens, SymInt max_seqlen, "
      "str kind, SymInt num_prefix, float? scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_check_score_tokens(Tensor q, Tensor k, Tensor? v, Tensor cu_seqlens, int max_seqlen, str kind, int num_prefix, "
      "float? scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("score_tokens", sait::boxed<sait::score_tokens>);
  m.impl("score_tokens_backward", sait::boxed<sait::score_tokens_backward>);
}

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_score_tokens", sait::boxed_checks<sait::check_score_tokens>);
}

#ifdef SAIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sait, CUDA, m) { m.impl("score_tokens", sait::boxed<sait::score_tokens>); }
#endif
