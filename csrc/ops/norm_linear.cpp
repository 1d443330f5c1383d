// norm_linear: schema, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {
namespace {

void check_norm_linear(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                       const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& gate_bias,
                       std::string_view activation) {
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

at::Tensor norm_linear(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                       const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& gate, const std::optional<at::Tensor>& gate_bias,
                       std::string_view activation) {
  check_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, gate, gate_bias, activation);
  return run_packed_linear(x, pack_linear(weight, gate), weight.size(0), bias,
                           {.norm_weight = norm_weight,
                            .norm_bias = norm_bias,
                            .eps = eps,
                            .activation = activation_of("norm_linear", activation),
                            .gated = gate.has_value(),
                            .gate_bias = gate_bias.value_or(at::Tensor())});
}

}  // namespace
}  // namespace sait

TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias, "
      "Tensor? gate, Tensor? gate_bias, str activation) -> Tensor");
  m.def(
      "_check_norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias, "
      "Tensor? gate, Tensor? gate_bias, str activation) -> ()");
}

TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("norm_linear", sait::norm_linear); }

TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) { m.impl("_check_norm_linear", sait::check_norm_linear); }
