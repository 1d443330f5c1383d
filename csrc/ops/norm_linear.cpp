// norm_linear: schema, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {
namespace {

void check_norm_linear(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                       const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gate,
                       const OptionalTensor& gate_bias, std::string_view activation) {
  constexpr const char* op = "norm_linear";
  check_rows(op, "x", x);
  check_norm(op, x, eps);
  check_channels(op, "norm_weight", norm_weight, x, x.size(1));
  check_channels(op, "norm_bias", norm_bias, x, x.size(1));
  check_linear(op, "x", x, weight, bias);
  if (gate) check_gate(op, "x", x, weight, *gate);
  check_gate_bias(op, gate_bias, gate.has_value(), x, weight.size(0));
  activation_of(op, activation);
}

Tensor norm_linear(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                   const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gate,
                   const OptionalTensor& gate_bias, std::string_view activation) {
  check_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, gate, gate_bias, activation);
  return run_packed_linear(x, pack_linear(weight, gate), weight.size(0), bias,
                           {.norm_weight = &norm_weight,
                            .norm_bias = &norm_bias,
                            .eps = eps,
                            .activation = activation_of("norm_linear", activation),
                            .gated = gate.has_value(),
                            .gate_bias = or_null(gate_bias)});
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias, "
      "Tensor? gate, Tensor? gate_bias, str activation) -> Tensor");
  m.def(
      "_check_norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias, "
      "Tensor? gate, Tensor? gate_bias, str activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("norm_linear", sait::boxed<sait::norm_linear>); }

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_norm_linear", sait::boxed_checks<sait::check_norm_linear>);
}
