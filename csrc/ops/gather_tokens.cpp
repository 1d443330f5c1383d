// gather_tokens and scatter_tokens: schema, checks, dispatch.
#include "sait/gather_tokens.h"

#include "ops/common.h"

#ifdef SAIT_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace sait {
namespace {

void check_gather_tokens(const Tensor& x, const Tensor& indices) {
  constexpr const char* op = "gather_tokens";
  check_rows(op, "x", x);
  check_indices(op, "selection.indices", indices, x, x.size(0));
}

Tensor gather_tokens(const Tensor& x, const Tensor& indices) {
  check_gather_tokens(x, indices);
  Tensor out = allocate(x, {indices.size(0), x.size(1)});
  const int64_t size = x.element_size();
  const GatherTokensParams params{
      x.const_data_ptr(), out.mutable_data_ptr(), indices.const_data_ptr<int32_t>(), indices.size(0), x.size(0),
      x.size(1) * size,   x.stride(0) * size};
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(x)) {
    launch("gather_tokens", x, [&](void* stream) { return cuda::gather_tokens(params, stream); });
    return out;
  }
#endif
  cpu::gather_tokens(params);
  return out;
}

void check_scatter_tokens(const Tensor& y, const Tensor& indices, int64_t total, const OptionalTensor& base) {
  constexpr const char* op = "scatter_tokens";
  check_rows(op, "y", y);
  SAIT_CHECK_VALUE(total >= 0, op, "total", "a number of rows >= 0", total,
                   "Pass the number of rows before the selection.");
  check_indices(op, "selection.indices", indices, y, total);
  SAIT_CHECK_VALUE(indices.size(0) == y.size(0), op, "selection.indices", "one row per row of y, " << y.size(0),
                   indices.size(0), "Scatter what was gathered with the same selection.");
  if (base) {
    check_rows(op, "base", *base);
    check_same(op, "base", *base, "y", y);
    SAIT_CHECK_VALUE(base->size(0) == total && base->size(1) == y.size(1), op, "base",
                     "shape (" << total << ", " << y.size(1) << ")", shape_of(*base),
                     "Pass the rows before the selection.");
  }
}

Tensor scatter_tokens(const Tensor& y, const Tensor& indices, int64_t total, const OptionalTensor& base) {
  check_scatter_tokens(y, indices, total, base);
  Tensor out = allocate(y, {total, y.size(1)});
  const int64_t size = y.element_size();
  const ScatterTokensParams params{y.const_data_ptr(),
                                   base ? base->const_data_ptr() : nullptr,
                                   out.mutable_data_ptr(),
                                   indices.const_data_ptr<int32_t>(),
                                   indices.size(0),
                                   total,
                                   y.size(1) * size,
                                   y.stride(0) * size,
                                   base ? base->stride(0) * size : 0};
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(y)) {
    launch("scatter_tokens", y, [&](void* stream) { return cuda::scatter_tokens(params, stream); });
    return out;
  }
#endif
  cpu::scatter_tokens(params);
  return out;
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def("gather_tokens(Tensor x, Tensor indices) -> Tensor");
  m.def("scatter_tokens(Tensor y, Tensor indices, SymInt total, Tensor? base=None) -> Tensor");
  m.def("_check_gather_tokens(Tensor x, Tensor indices) -> ()");
  m.def("_check_scatter_tokens(Tensor y, Tensor indices, int total, Tensor? base=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("gather_tokens", sait::boxed<sait::gather_tokens>);
  m.impl("scatter_tokens", sait::boxed<sait::scatter_tokens>);
}

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_gather_tokens", sait::boxed_checks<sait::check_gather_tokens>);
  m.impl("_check_scatter_tokens", sait::boxed_checks<sait::check_scatter_tokens>);
}

#ifdef SAIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sait, CUDA, m) {
  m.impl("gather_tokens", sait::boxed<sait::gather_tokens>);
  m.impl("scatter_tokens", sait::boxed<sait::scatter_tokens>);
}
#endif
