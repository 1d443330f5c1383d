// linear_residual: schema, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {
namespace {

void check_linear_residual(const at::Tensor& y, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const at::Tensor& x, const std::optional<at::Tensor>& indices,
                           const std::optional<at::Tensor>& gamma) {
  constexpr const char* op = "linear_residual";
  check_rows(op, "y", y);
  check_linear(op, "y", y, weight, bias);
  check_residual(op, "y", y, "x", x, indices, weight.size(0));
  if (gamma) check_channels(op, "gamma", *gamma, y, weight.size(0));
}

at::Tensor linear_residual(const at::Tensor& y, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                           const at::Tensor& x, const std::optional<at::Tensor>& indices,
                           const std::optional<at::Tensor>& gamma) {
  check_linear_residual(y, weight, bias, x, indices, gamma);
  return run_packed_linear(
      y, pack_linear(weight), weight.size(0), bias,
      {.residual = x, .indices = indices.value_or(at::Tensor()), .gamma = gamma.value_or(at::Tensor())});
}

}  // namespace
}  // namespace sait

TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def("linear_residual(Tensor y, Tensor weight, Tensor? bias, Tensor x, Tensor? indices, Tensor? gamma) -> Tensor");
  m.def(
      "_check_linear_residual(Tensor y, Tensor weight, Tensor? bias, Tensor x, Tensor? indices, Tensor? gamma) -> ()");
}

TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("linear_residual", sait::linear_residual); }

TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_linear_residual", sait::check_linear_residual);
}
