// norm_heads: schema, checks, dispatch.
#include "sait/norm_heads.h"

#include "ops/common.h"

namespace sait {
namespace {

Tensor norm_heads(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  constexpr const char* op = "norm_heads";
  SAIT_CHECK_VALUE(x.dim() == 3 && x.size(1) >= 1 && x.size(2) >= 1, op, "x", "a packed (T, H, D) tensor", shape_of(x),
                   "View a projection as heads: x.unflatten(1, (heads, head_dim)).");
  check_dtype(op, "x", x);
  check_last_contiguous(op, "x", x);
  check_channels(op, "weight", weight, x, x.size(2));
  check_channels(op, "bias", bias, x, x.size(2));
  check_eps(op, "eps", eps);
  const Contiguous weight_in_float(&weight, ScalarType::Float), bias_in_float(&bias, ScalarType::Float);
  Tensor out = allocate_like(x);
  cpu::norm_heads({head_view(x), weight_in_float.data<float>(), bias_in_float.data<float>(), static_cast<float>(eps),
                   x.size(0), x.size(1), x.size(2), dtype_of(x), out.mutable_data_ptr()});
  return out;
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def("norm_heads(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("norm_heads", sait::boxed<sait::norm_heads>); }
