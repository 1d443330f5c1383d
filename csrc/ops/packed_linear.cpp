// pack_linear, packed_linear and packed_block: schemas, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {

Tensor pack_linear(const Tensor& weight, const OptionalTensor& gate) {
  check_rows("pack_linear", "weight", weight);
  if (gate) check_gate("pack_linear", "weight", weight, weight, *gate);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const DType dtype = dtype_of(weight);
  const Tensor packed =
      allocate(weight, {packed_blocks(outputs, gate.has_value()), packed_depth(inputs, dtype), kPackedColumns});
  const RowView gate_rows = gate ? row_view(*gate) : RowView{nullptr, 0};
  cpu::pack_linear({row_view(weight), gate_rows, outputs, inputs, dtype, packed.mutable_data_ptr()});
  return packed;
}

namespace {

// The vectors of a layer in float, which have to live as long as the parameters that point to them.
struct Vectors {
  Contiguous bias, gate_bias, norm_weight, norm_bias, gamma;

  Vectors(const OptionalTensor& layer_bias, const Around& around)
      : bias(or_null(layer_bias), ScalarType::Float),
        gate_bias(around.gate_bias, ScalarType::Float),
        norm_weight(around.norm_weight, ScalarType::Float),
        norm_bias(around.norm_bias, ScalarType::Float),
        gamma(around.gamma, ScalarType::Float) {}
};

// Of a layer whose rows are those of `x` and whose results go to `out`, or, where one is nullptr, are made and taken by
// the kernel itself.
PackedLinearParams parameters(const Tensor* x, const Tensor& packed, int64_t inputs, int64_t outputs,
                              const Vectors& vectors, const Around& around, const Tensor* out) {
  PackedLinearParams p{};
  if (x != nullptr) {
    p.x = row_view(*x);
    p.rows = x->size(0);
  }
  p.packed = packed.const_data_ptr();
  p.gated = around.gated;
  p.bias = vectors.bias.data<float>();
  p.gate_bias = vectors.gate_bias.data<float>();
  p.norm_weight = vectors.norm_weight.data<float>();
  p.norm_bias = vectors.norm_bias.data<float>();
  p.eps = static_cast<float>(around.eps);
  p.activation = around.activation;
  if (around.residual != nullptr) {
    p.residual = row_view(*around.residual);
    p.total = around.residual->size(0);
  }
  if (around.indices != nullptr) p.indices = around.indices->const_data_ptr<int32_t>();
  p.gamma = vectors.gamma.data<float>();
  p.inputs = inputs;
  p.outputs = outputs;
  p.dtype = dtype_of(packed);
  if (out != nullptr) p.out = out->mutable_data_ptr();
  return p;
}

}  // namespace

Tensor run_packed_linear(const Tensor& x, const Tensor& packed, int64_t outputs, const OptionalTensor& bias,
                         const Around& around) {
  const Vectors vectors(bias, around);
  Tensor out = allocate(x, {x.size(0), outputs});
  cpu::packed_linear(parameters(&x, packed, x.size(1), outputs, vectors, around, &out));
  return out;
}

namespace {

Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t out_features, const OptionalTensor& bias,
                     const OptionalTensor& gate_bias, bool gated, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, double eps, std::string_view activation,
                     const OptionalTensor& residual, const OptionalTensor& indices, const OptionalTensor& gamma) {
  constexpr const char* op = "packed_linear";
  check_rows(op, "x", x);
  check_packed(op, "packed", packed, x, x.size(1), out_features, gated);
  if (bias) check_channels(op, "bias", *bias, x, out_features);
  check_gate_bias(op, gate_bias, gated, x, out_features);
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
  return run_packed_linear(x, packed, out_features, bias,
                           {.norm_weight = or_null(norm_weight),
                            .norm_bias = or_null(norm_bias),
                            .eps = eps,
                            .activation = activation_of(op, activation),
                            .gated = gated,
                            .gate_bias = or_null(gate_bias),
                            .residual = or_null(residual),
                            .indices = or_null(indices),
                            .gamma = or_null(gamma)});
}

Tensor packed_block(const Tensor& y, const Tensor& x, const OptionalTensor& indices, const Tensor& proj,
                    const OptionalTensor& proj_bias, const OptionalTensor& gamma1, const Tensor& norm_weight,
                    const Tensor& norm_bias, double eps, const Tensor& fc1, const OptionalTensor& fc1_bias,
                    const OptionalTensor& gate_bias, bool gated, std::string_view activation, int64_t hidden_features,
                    const OptionalTensor& hidden_norm_weight, const OptionalTensor& hidden_norm_bias, double hidden_eps,
                    const Tensor& fc2, const OptionalTensor& fc2_bias, const OptionalTensor& gamma2) {
  constexpr const char* op = "packed_block";
  check_rows(op, "y", y);
  check_rows(op, "x", x);
  const int64_t channels = x.size(1);
  check_residual(op, "y", y, "x", x, indices, channels);
  check_norm(op, x, eps);
  check_packed(op, "proj", proj, x, y.size(1), channels, false);
  check_packed(op, "fc1", fc1, x, channels, hidden_features, gated);
  check_packed(op, "fc2", fc2, x, hidden_features, channels, false);
  const auto check_vector = [&](const char* name, const OptionalTensor& t, int64_t size) {
    if (t) check_channels(op, name, *t, x, size);
  };
  check_vector("proj_bias", proj_bias, channels);
  check_vector("gamma1", gamma1, channels);
  check_vector("norm_weight", norm_weight, channels);
  check_vector("norm_bias", norm_bias, channels);
  check_vector("fc1_bias", fc1_bias, hidden_features);
  check_gate_bias(op, gate_bias, gated, x, hidden_features);
  SAIT_CHECK_VALUE(hidden_norm_weight.has_value() == hidden_norm_bias.has_value(), op, "hidden_norm",
                   "both weight and bias", "one of them", "Pass those of one LayerNorm, or neither.");
  if (hidden_norm_weight) check_eps(op, "hidden_norm eps", hidden_eps);
  check_vector("hidden_norm weight", hidden_norm_weight, hidden_features);
  check_vector("hidden_norm bias", hidden_norm_bias, hidden_features);
  check_vector("fc2_bias", fc2_bias, channels);
  check_vector("gamma2", gamma2, channels);

  const Around after{.residual = &x, .indices = or_null(indices), .gamma = or_null(gamma1)};
  const Around around{.norm_weight = &norm_weight,
                      .norm_bias = &norm_bias,
                      .eps = eps,
                      .activation = activation_of(op, activation),
                      .gated = gated,
                      .gate_bias = or_null(gate_bias)};
  const Around last{.norm_weight = or_null(hidden_norm_weight),
                    .norm_bias = or_null(hidden_norm_bias),
                    .eps = hidden_eps,
                    .gamma = or_null(gamma2)};
  const Vectors of_proj(proj_bias, after), of_fc1(fc1_bias, around), of_fc2(fc2_bias, last);
  Tensor out = allocate(x, {y.size(0), channels});
  cpu::packed_block({parameters(&y, proj, y.size(1), channels, of_proj, after, &out),
                     parameters(nullptr, fc1, channels, hidden_features, of_fc1, around, nullptr),
                     parameters(nullptr, fc2, hidden_features, channels, of_fc2, last, &out)});
  return out;
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def("pack_linear(Tensor weight, Tensor? gate) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor packed, int out_features, Tensor? bias, Tensor? gate_bias, bool gated, "
      "Tensor? norm_weight, Tensor? norm_bias, float eps, str activation, Tensor? residual, Tensor? indices, "
      "Tensor? gamma) -> Tensor");
  m.def(
      "packed_block(Tensor y, Tensor x, Tensor? indices, Tensor proj, Tensor? proj_bias, Tensor? gamma1, "
      "Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1, Tensor? fc1_bias, Tensor? gate_bias, bool gated, "
      "str activation, int hidden_features, Tensor? hidden_norm_weight, Tensor? hidden_norm_bias, float hidden_eps, "
      "Tensor fc2, Tensor? fc2_bias, Tensor? gamma2) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("pack_linear", sait::boxed<sait::pack_linear>);
  m.impl("packed_linear", sait::boxed<sait::packed_linear>);
  m.impl("packed_block", sait::boxed<sait::packed_block>);
}
