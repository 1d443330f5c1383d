// linear_residual: schema, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {
namespace {

void check_linear_residual(const Tensor& y, const Tensor& weight, const OptionalTensor& bias, const Tensor& x,
                           const OptionalTensor& indices, const OptionalTensor& gamma) {
  constexpr const char* op = "linear_residual";
  check_rows(op, "y", y);
  check_linear(op, "y", y, weight, bias);
  check_residual(op, "y", y, "x", x, indices, weight.size(0));
  if (gamma) check_channels(op, "gamma", *gamma, y, weight.size(0));
}

Tensor linear_residual(const Tensor& y, const Tensor& weight, const OptionalTensor& bias, const Tensor& x,
                       const OptionalTensor& indices, const OptionalTensor& gamma) {
  check_linear_residual(y, weight, bias, x, indices, gamma);
  return run_packed_linear(y, pack_linear(weight), weight.size(0), bias,
                           {.residual = &x, .indices = or_null(indices), .gamma = or_null(gamma)});
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def("linear_residual(Tensor y, Tensor weight, Tensor? bias, Tensor x, Tensor? indices, Tensor? gamma) -> Tensor");
  m.def(
      "_check_linear_residual(Tensor y, Tensor weight, Tensor? bias, Tensor x, Tensor? indices, Tensor? gamma) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("linear_residual", sait::boxed<sait::linear_residual>); }

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_linear_residual", sait::boxed_checks<sait::check_linear_residual>);
}
