// pack_linear, packed_linear and packed_block: schemas, checks, dispatch.
#include "ops/packed_linear.h"

namespace sait {

at::Tensor pack_linear(const at::Tensor& weight, const std::optional<at::Tensor>& gate) {
  check_rows("pack_linear", "weight", weight);
  if (gate) check_gate("pack_linear", "weight", weight, weight, *gate);
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const DType dtype = dtype_of(weight);
  at::Tensor packed = at::empty({packed_blocks(outputs, gate.has_value()), packed_depth(inputs, dtype), kPackedColumns},
                                weight.options());
  const RowView gate_rows = gate ? row_view(*gate) : RowView{nullptr, 0};
  cpu::pack_linear({row_view(weight), gate_rows, outputs, inputs, dtype, packed.mutable_data_ptr()});
  return packed;
}

namespace {

const float* data_of(const at::Tensor& vector) { return vector.defined() ? vector.const_data_ptr<float>() : nullptr; }

// The vectors of a layer in float, which have to live as long as the parameters that point to them.
struct Vectors {
  at::Tensor bias, gate_bias, norm_weight, norm_bias, gamma;

  Vectors(const std::optional<at::Tensor>& layer_bias, const Around& around) {
    const auto vector = [](const at::Tensor& t) { return t.defined() ? channel_vector(t) : t; };
    bias = vector(layer_bias.value_or(at::Tensor()));
    gate_bias = vector(around.gate_bias);
    norm_weight = vector(around.norm_weight);
    norm_bias = vector(around.norm_bias);
    gamma = vector(around.gamma);
  }
};

// Of a layer whose rows are those of `x`, or, where that is undefined, made by the kernel itself.
PackedLinearParams parameters(const at::Tensor& x, const at::Tensor& packed, int64_t inputs, int64_t outputs,
                              const Vectors& vectors, const Around& around, const at::Tensor& out) {
  PackedLinearParams p{};
  if (x.defined()) p.x = row_view(x);
  p.packed = packed.const_data_ptr();
  p.gated = around.gated;
  p.bias = data_of(vectors.bias);
  p.gate_bias = data_of(vectors.gate_bias);
  p.norm_weight = data_of(vectors.norm_weight);
  p.norm_bias = data_of(vectors.norm_bias);
  p.eps = static_cast<float>(around.eps);
  p.activation = around.activation;
  if (around.residual.defined()) {
    p.residual = row_view(around.residual);
    p.total = around.residual.size(0);
  }
  if (around.indices.defined()) p.indices = around.indices.const_data_ptr<int32_t>();
  p.gamma = data_of(vectors.gamma);
  p.rows = x.defined() ? x.size(0) : 0;
  p.inputs = inputs;
  p.outputs = outputs;
  p.dtype = dtype_of(packed);
  p.out = out.defined() ? out.mutable_data_ptr() : nullptr;
  return p;
}

void check_packed(const char* op, const char* name, const at::Tensor& packed, const at::Tensor& like, int64_t inputs,
                  int64_t outputs, bool gated) {
  check_same(op, name, packed, "x", like);
  const int64_t blocks = packed_blocks(outputs, gated), depth = packed_depth(inputs, dtype_of(like));
  SAIT_CHECK_VALUE(outputs >= 0 && packed.dim() == 3 && packed.size(0) == blocks && packed.size(1) == depth &&
                       packed.size(2) == kPackedColumns && packed.is_contiguous(),
                   op, name,
                   "a contiguous (" << blocks << ", " << depth << ", " << kPackedColumns << ") for " << inputs
                                    << " inputs and " << outputs << (gated ? " gated outputs" : " outputs"),
                   shape_of(packed), "Pass what pack_linear made of the weight, and the weight's shape[0].");
}

at::Tensor or_none(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }

}  // namespace

at::Tensor run_packed_linear(const at::Tensor& x, const at::Tensor& packed, int64_t outputs,
                             const std::optional<at::Tensor>& bias, const Around& around) {
  const Vectors vectors(bias, around);
  at::Tensor out = at::empty({x.size(0), outputs}, x.options());
  cpu::packed_linear(parameters(x, packed, x.size(1), outputs, vectors, around, out));
  return out;
}

namespace {

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed, int64_t out_features,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& gate_bias, bool gated,
                         const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
                         double eps, std::string_view activation, const std::optional<at::Tensor>& residual,
                         const std::optional<at::Tensor>& indices, const std::optional<at::Tensor>& gamma) {
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
                           {.norm_weight = or_none(norm_weight),
                            .norm_bias = or_none(norm_bias),
                            .eps = eps,
                            .activation = activation_of(op, activation),
                            .gated = gated,
                            .gate_bias = or_none(gate_bias),
                            .residual = or_none(residual),
                            .indices = or_none(indices),
                            .gamma = or_none(gamma)});
}

at::Tensor packed_block(const at::Tensor& y, const at::Tensor& x, const std::optional<at::Tensor>& indices,
                        const at::Tensor& proj, const std::optional<at::Tensor>& proj_bias,
                        const std::optional<at::Tensor>& gamma1, const at::Tensor& norm_weight,
                        const at::Tensor& norm_bias, double eps, const at::Tensor& fc1,
                        const std::optional<at::Tensor>& fc1_bias, const std::optional<at::Tensor>& gate_bias,
                        bool gated, std::string_view activation, int64_t hidden_features,
                        const std::optional<at::Tensor>& hidden_norm_weight,
                        const std::optional<at::Tensor>& hidden_norm_bias, double hidden_eps, const at::Tensor& fc2,
                        const std::optional<at::Tensor>& fc2_bias, const std::optional<at::Tensor>& gamma2) {
  constexpr const char* op = "packed_block";
  check_rows(op, "y", y);
  check_rows(op, "x", x);
  const int64_t channels = x.size(1);
  check_residual(op, "y", y, "x", x, indices, channels);
  check_norm(op, x, eps);
  check_packed(op, "proj", proj, x, y.size(1), channels, false);
  check_packed(op, "fc1", fc1, x, channels, hidden_features, gated);
  check_packed(op, "fc2", fc2, x, hidden_features, channels, false);
  const auto check_vector = [&](const char* name, const std::optional<at::Tensor>& t, int64_t size) {
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

  const Around after{.residual = x, .indices = or_none(indices), .gamma = or_none(gamma1)};
  const Around around{.norm_weight = norm_weight,
                      .norm_bias = norm_bias,
                      .eps = eps,
                      .activation = activation_of(op, activation),
                      .gated = gated,
                      .gate_bias = or_none(gate_bias)};
  const Around last{.norm_weight = or_none(hidden_norm_weight),
                    .norm_bias = or_none(hidden_norm_bias),
                    .eps = hidden_eps,
                    .gamma = or_none(gamma2)};
  const Vectors of_proj(proj_bias, after), of_fc1(fc1_bias, around), of_fc2(fc2_bias, last);
  at::Tensor out = at::empty({y.size(0), channels}, x.options());
  const at::Tensor none;
  cpu::packed_block({parameters(y, proj, y.size(1), channels, of_proj, after, out),
                     parameters(none, fc1, channels, hidden_features, of_fc1, around, none),
                     parameters(none, fc2, hidden_features, channels, of_fc2, last, out)});
  return out;
}

}  // namespace
}  // namespace sait

TORCH_LIBRARY_FRAGMENT(sait, m) {
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

TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("pack_linear", sait::pack_linear);
  m.impl("packed_linear", sait::packed_linear);
  m.impl("packed_block", sait::packed_block);
}
