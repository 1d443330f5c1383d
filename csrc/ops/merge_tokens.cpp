// merge_tokens: schema, checks, dispatch.
#include "sait/merge_tokens.h"

#include <limits>

#include "ops/common.h"

namespace sait {
namespace {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

int64_t last_offset(const Tensor& cu) { return cu.const_data_ptr<int32_t>()[cu.size(0) - 1]; }

// On the CPU: each row goes into a row of an image, or nowhere. Elsewhere the values are not read here.
void check_targets(const char* op, const Tensor& target, const Tensor& weight, const Tensor& cu, const Tensor& like,
                   int64_t rows) {
  check_int32_vector(op, "target", target, like);
  SAIT_CHECK_VALUE(target.size(0) == rows, op, "target", rows << ", one for each row of x", target.size(0),
                   "It is -1 where a row goes nowhere.");
  SAIT_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == rows, op, "weight",
                   "shape (" << rows << ",), one for each row of x", shape_of(weight), "Pass ones for plain sums.");
  check_device(op, "weight", weight, "the rows", like);
  SAIT_CHECK_TYPE(weight.scalar_type() == ScalarType::Float, op, "weight", "dtype Float (float32)",
                  weight.scalar_type(), "Convert with .float().");
  if (!like.is_cpu()) return;
  const int32_t* values = target.const_data_ptr<int32_t>();
  const int64_t last = last_offset(cu);
  for (int64_t t = 0; t < rows; ++t) {
    SAIT_CHECK_VALUE(values[t] >= -1 && values[t] < last, op, "target",
                     "rows of the images in [0, " << last << "), or -1 for none", values[t] << " at row " << t,
                     "Count rows from the first image's first one, and end cu_seqlens_out with their number.");
  }
}

void check_merge_tokens(const Tensor& x, const Tensor& target, const Tensor& weight, const Tensor& cu_seqlens_out,
                        int64_t max_seqlen_out, std::optional<int64_t> total) {
  constexpr const char* op = "merge_tokens";
  check_rows(op, "x", x);
  SAIT_CHECK_VALUE(x.size(0) <= std::numeric_limits<int32_t>::max(), op, "x", "fewer than 2^31 rows", shape_of(x),
                   "Merge fewer images at a time.");
  check_cu_seqlens(op, "cu_seqlens_out", cu_seqlens_out, x, kNoLimit, max_seqlen_out, 0, "max_seqlen_out");
  SAIT_CHECK_VALUE(!total || *total >= 0, op, "total", "a number of rows >= 0", *total,
                   "Pass the number of rows of the result.");
  SAIT_CHECK_VALUE(!total || !x.is_cpu() || *total >= last_offset(cu_seqlens_out), op, "total",
                   "at least " << last_offset(cu_seqlens_out) << ", the last value of cu_seqlens_out", *total,
                   "Pass the number of rows of the result, those of no image included.");
  check_targets(op, target, weight, cu_seqlens_out, x, x.size(0));
}

Tensor merge_tokens(const Tensor& x, const Tensor& target, const Tensor& weight, const Tensor& cu_seqlens_out,
                    int64_t max_seqlen_out, std::optional<int64_t> total) {
  check_merge_tokens(x, target, weight, cu_seqlens_out, max_seqlen_out, total);
  const int64_t rows = total.value_or(last_offset(cu_seqlens_out));
  const Contiguous weights(weight, ScalarType::Float);
  Tensor out = allocate(x, {rows, x.size(1)});
  cpu::merge_tokens({row_view(x), target.const_data_ptr<int32_t>(), weights.data<float>(), x.size(0), rows, x.size(1),
                     dtype_of(x), out.mutable_data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor> merge_tokens_backward(const Tensor& grad, const OptionalTensor& x, const Tensor& target,
                                                 const Tensor& weight, const Tensor& cu_seqlens_out) {
  constexpr const char* op = "merge_tokens_backward";
  check_rows(op, "grad", grad);
  check_cu_seqlens(op, "cu_seqlens_out", cu_seqlens_out, grad, grad.size(0), kNoLimit, 0);
  check_targets(op, target, weight, cu_seqlens_out, grad, target.numel());
  const int64_t rows = target.size(0), channels = grad.size(1);
  if (x) {
    check_rows(op, "x", *x);
    check_same(op, "x", *x, "grad", grad);
    SAIT_CHECK_VALUE(x->size(0) == rows && x->size(1) == channels, op, "x",
                     "shape (" << rows << ", " << channels << ")", shape_of(*x), "Pass what the forward call took.");
  }
  const Contiguous weights(weight, ScalarType::Float);
  Tensor dx = allocate(grad, {rows, channels}), dweight = allocate(grad, {x ? rows : 0}, ScalarType::Float);
  cpu::merge_tokens_backward({row_view(grad), x ? row_view(*x) : RowView{nullptr, 0}, target.const_data_ptr<int32_t>(),
                              weights.data<float>(), rows, channels, dtype_of(grad), dx.mutable_data_ptr(),
                              x ? dweight.mutable_data_ptr<float>() : nullptr});
  return {dx, dweight};
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "merge_tokens(Tensor x, Tensor target, Tensor weight, Tensor cu_seqlens_out, SymInt max_seqlen_out, SymInt? "
      "total=None) -> Tensor");
  m.def(
      "merge_tokens_backward(Tensor grad, Tensor? x, Tensor target, Tensor weight, Tensor cu_seqlens_out) -> (Tensor, "
      "Tensor)");
  m.def(
      "_check_merge_tokens(Tensor x, Tensor target, Tensor weight, Tensor cu_seqlens_out, int max_seqlen_out, int? "
      "total=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("merge_tokens", sait::boxed<sait::merge_tokens>);
  m.impl("merge_tokens_backward", sait::boxed<sait::merge_tokens_backward>);
}

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_merge_tokens", sait::boxed_checks<sait::check_merge_tokens>);
}
