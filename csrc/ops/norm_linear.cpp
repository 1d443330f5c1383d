// norm_linear: schema, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {
namespace {

void check_norm_linear(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                       const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool) {
  constexpr const char* op = "norm_linear";
  check_rows(op, "x", x);
  check_norm(op, x, eps);
  check_channels(op, "norm_weight", norm_weight, x, x.size(1));
  check_channels(op, "norm_bias", norm_bias, x, x.size(1));
  check_linear(op, "x", x, weight, bias);
}

at::Tensor norm_linear(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
                       const at::Tensor& weight, const std::optional<at::Tensor>& bias, bool gelu) {
  check_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, gelu);
  return run_packed_linear(x, pack_linear(weight), weight.size(0), bias,
                           {.norm_weight = norm_weight, .norm_bias = norm_bias, .eps = eps, .gelu = gelu});
}

}  // namespace
}  // namespace sait

TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias, bool gelu) "
      "-> Tensor");
  m.def(
      "_check_norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, Tensor? bias, bool "
      "gelu) -> ()");
}

TORCH_LIBRARY_IMPL(sait, CPU, m) { m.impl("norm_linear", sait::norm_linear); }

TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) { m.impl("_check_norm_linear", sait::check_norm_linear); }
