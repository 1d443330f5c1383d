// pack_linear and packed_linear: schemas, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {

at::Tensor pack_linear(const at::Tensor& weight) {
  check_rows("pack_linear", "weight", weight);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const DType dtype = dtype_of(weight);
  at::Tensor packed =
      at::empty({packed_blocks(outputs), packed_depth(inputs, dtype), kPackedColumns}, weight.options());
  cpu::pack_linear({row_view(weight), outputs, inputs, dtype, packed.mutable_data_ptr()});
  return packed;
}

at::Tensor run_packed_linear(const at::Tensor& x, const at::Tensor& packed, int64_t outputs,
                             const std::optional<at::Tensor>& bias, const Around& around) {
  const auto vector = [](const at::Tensor& t) { return t.defined() ? channel_vector(t) : t; };
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  const at::Tensor biases = vector(bias.value_or(at::Tensor())), norm_weights = vector(around.norm_weight),
                   norm_biases = vector(around.norm_bias), gammas = vector(around.gamma);
  at::Tensor out = at::empty({x.size(0), outputs}, x.options());
  cpu::packed_linear({row_view(x), packed.const_data_ptr(), data(biases), data(norm_weights), data(norm_biases),
                      static_cast<float>(around.eps), around.gelu,
                      around.residual.defined() ? row_view(around.residual) : RowView{nullptr, 0},
                      around.indices.defined() ? around.indices.const_data_ptr<int32_t>() : nullptr,
                      around.residual.defined() ? around.residual.size(0) : 0, data(gammas), x.size(0), x.size(1),
                      outputs, dtype_of(x), out.mutable_data_ptr()});
  return out;
}

namespace {

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, int64_t out_features,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm_weight,
                         const std::optional<at::Tensor>& norm_bias, double eps, bool gelu,
                         const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& indices,
                         const std::optional<at::Tensor>& gamma) {
  constexpr const char* op = "packed_linear";
  check_rows(op, "x", x);
  check_same(op, "packed", packed, "x", x);
  const int64_t blocks = packed_blocks(out_features), depth = packed_depth(x.size(1), dtype_of(x));
  SAIT_CHECK_VALUE(out_features >= 0 && packed.dim() == 3 && packed.size(0) == blocks && packed.size(1) == depth &&
                       packed.size(2) == kPackedColumns && packed.is_contiguous(),
                   op, "packed",
                   "a contiguous (" << blocks << ", " << depth << ", " << kPackedColumns << ") for " << x.size(1)
                                    << " inputs and " << out_features << " outputs",
                   shape_of(packed), "Pass what pack_linear made of the weight, and the weight's shape[0].");
  if (bias) check_channels(op, "bias", *bias, x, out_features);
  SAIT_CHECK_VALUE(norm_weight.has_value() == norm_bias.has_value(), op, "norm", "both weight and bias", "one of them",
                   "Pass those of one LayerNorm, or neither.");
  if (norm_weight) {
    check_norm(op, x, eps);
    check_channels(op, "norm weight", *norm_weight, x, x.size(1));
    check_channels(op, "norm bias", *norm_bias, x, x.size(1));
  }
  if (residual) check_residual(op, "x", x, "residual", *residual, indices, out_features);
  SAIT_CHECK_VALUE(residual || !indices, op, "selection", "a residual to select from", "a selection alone",
                   "Leave the selection out: x has the selected rows already.");
  if (gamma) check_channels(op, "gamma", *gamma, x, out_features);
  const auto or_none = [](const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); };
  return run_packed_linear(
      x, packed, out_features, bias,
      {or_none(norm_weight), or_none(norm_bias), eps, gelu, or_none(residual), or_none(indices), or_none(gamma)});
}

}  // namespace
}  // namespace sait

TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor packed, int out_features, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
      "float eps, bool gelu, Tensor? residual, Tensor? indices, Tensor? gamma) -> Tensor");
}

TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("pack_linear", sait::pack_linear);
  m.impl("packed_linear", sait::packed_linear);
}
