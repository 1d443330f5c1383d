// select_topk and select_mass: schema, checks, dispatch.
#include "ops/select.h"

namespace sait {
namespace {

void check_scores(const char* op, const Tensor& scores, const Tensor& cu_seqlens, int64_t max_seqlen,
                  int64_t num_prefix) {
  SAIT_CHECK_VALUE(scores.dim() == 1, op, "scores", "a packed (T,) tensor", shape_of(scores),
                   "A batch (B, N) becomes packed by .flatten().");
  SAIT_CHECK_TYPE(scores.scalar_type() == ScalarType::Float, op, "scores", "dtype Float (float32)",
                  scores.scalar_type(), "Convert with .float().");
  check_cu_seqlens(op, "cu_seqlens", cu_seqlens, scores, scores.size(0), max_seqlen, num_prefix);
}

KeepRule check_select_topk(const Tensor& scores, const Tensor& cu_seqlens, int64_t max_seqlen,
                           std::optional<double> rate, std::optional<int64_t> count, int64_t num_prefix) {
  check_scores("select_topk", scores, cu_seqlens, max_seqlen, num_prefix);
  return topk_rule("select_topk", rate, count);
}

KeepRule check_select_mass(const Tensor& scores, const Tensor& cu_seqlens, int64_t max_seqlen, double mass,
                           int64_t num_prefix, int64_t min_keep, std::optional<int64_t> max_keep, bool) {
  check_scores("select_mass", scores, cu_seqlens, max_seqlen, num_prefix);
  return mass_rule("select_mass", mass, min_keep, max_keep);
}

std::tuple<Tensor, Tensor> select_topk(const Tensor& scores, const Tensor& cu_seqlens, int64_t max_seqlen,
                                       std::optional<double> rate, std::optional<int64_t> count, int64_t num_prefix) {
  const KeepRule rule = check_select_topk(scores, cu_seqlens, max_seqlen, rate, count, num_prefix);
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(scores)) return select_cuda("select_topk", scores, cu_seqlens, max_seqlen, num_prefix, rule, false);
#endif
  const Tensor kept_cu = topk_cu_seqlens("select_topk", cu_seqlens, num_prefix, rule);
  const int32_t* offsets = kept_cu.const_data_ptr<int32_t>();
  const Batch batch = batch_view(cu_seqlens, max_seqlen);
  const int64_t total = scores.size(0), kept = offsets[batch.images];
  const int64_t rows = is_full(batch, total) ? capacity(batch, total, num_prefix, rule) : kept;
  Tensor indices = empty_indices(rows, kept, total, cu_seqlens);
  const Contiguous contiguous(scores, ScalarType::Float);
  cpu::select(
      {contiguous.data<float>(), batch, num_prefix, rule, offsets, indices.mutable_data_ptr<int32_t>(), nullptr});
  return {indices, kept_cu};
}

std::tuple<Tensor, Tensor> select_mass(const Tensor& scores, const Tensor& cu_seqlens, int64_t max_seqlen, double mass,
                                       int64_t num_prefix, int64_t min_keep, std::optional<int64_t> max_keep,
                                       bool is_static) {
  const KeepRule rule =
      check_select_mass(scores, cu_seqlens, max_seqlen, mass, num_prefix, min_keep, max_keep, is_static);
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(scores)) {
    return select_cuda("select_mass", scores, cu_seqlens, max_seqlen, num_prefix, rule, is_static);
  }
#endif
  const Batch batch = batch_view(cu_seqlens, max_seqlen);
  // How many rows stay is known only afterwards: each image writes where its own rows lie, then they move together.
  const Tensor spread = allocate(cu_seqlens, {scores.size(0)});
  Tensor kept_cu = allocate_like(cu_seqlens);
  int32_t* offsets = kept_cu.mutable_data_ptr<int32_t>();
  offsets[0] = 0;
  const Contiguous contiguous(scores, ScalarType::Float);
  cpu::select({contiguous.data<float>(), batch, num_prefix, rule, batch.cu_seqlens, spread.mutable_data_ptr<int32_t>(),
               offsets + 1});
  for (int64_t b = 0; b < batch.images; ++b) offsets[b + 1] += offsets[b];
  const int64_t total = scores.size(0), kept = offsets[batch.images];
  const int64_t rows = is_static ? capacity(batch, total, num_prefix, rule) : kept;
  Tensor indices = empty_indices(rows, kept, total, cu_seqlens);
  for (int64_t b = 0; b < batch.images; ++b) {
    std::copy_n(spread.const_data_ptr<int32_t>() + batch.cu_seqlens[b], offsets[b + 1] - offsets[b],
                indices.mutable_data_ptr<int32_t>() + offsets[b]);
  }
  return {indices, kept_cu};
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "select_topk(Tensor scores, Tensor cu_seqlens, SymInt max_seqlen, float? rate, SymInt? count, "
      "SymInt num_prefix) -> (Tensor, Tensor)");
  m.def(
      "select_mass(Tensor scores, Tensor cu_seqlens, SymInt max_seqlen, float mass, SymInt num_prefix, "
      "SymInt min_keep, SymInt? max_keep, bool static=False) -> (Tensor, Tensor)");
  m.def(
      "_check_select_topk(Tensor scores, Tensor cu_seqlens, int max_seqlen, float? rate, int? count, int num_prefix) "
      "-> ()");
  m.def(
      "_check_select_mass(Tensor scores, Tensor cu_seqlens, int max_seqlen, float mass, int num_prefix, int min_keep, "
      "int? max_keep, bool static=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("select_topk", sait::boxed<sait::select_topk>);
  m.impl("select_mass", sait::boxed<sait::select_mass>);
}

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_select_topk", sait::boxed_checks<sait::check_select_topk>);
  m.impl("_check_select_mass", sait::boxed_checks<sait::check_select_mass>);
}

#ifdef SAIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sait, CUDA, m) {
  m.impl("select_topk", sait::boxed<sait::select_topk>);
  m.impl("select_mass", sait::boxed<sait::select_mass>);
}
#endif
