// What the ops around packed_linear share: checks of a linear layer's parameters, and the call of the kernel.
#pragma once

#include <string_view>

#include "ops/common.h"
#include "sait/packed_linear.h"

namespace sait {

inline Activation activation_of(const char* op, std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "quick_gelu") return Activation::kQuickGelu;
  SAIT_CHECK_VALUE(name == "silu", op, "activation", "one of 'none', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu'",
                   "'" << name << "'", "Choose one of them.");
  return Activation::kSilu;
}

// The parameters of a linear layer over the rows of x, which the op calls `name`.
inline void check_linear(const char* op, const char* name, const Tensor& x, const Tensor& weight,
                         const OptionalTensor& bias) {
  check_rows(op, "weight", weight);
  check_same(op, "weight", weight, name, x);
  SAIT_CHECK_VALUE(weight.size(1) == x.size(1) && x.size(1) >= 1, op, "weight",
                   "shape (O, " << x.size(1) << "), the channels of " << name << ", at least one", shape_of(weight),
                   "Pass Linear.weight.");
  if (bias) check_channels(op, "bias", *bias, x, weight.size(0));
}

// A weight's gate; `like` has their dtype.
inline void check_gate(const char* op, const char* name, const Tensor& like, const Tensor& weight, const Tensor& gate) {
  check_rows(op, "gate", gate);
  check_same(op, "gate", gate, name, like);
  SAIT_CHECK_VALUE(gate.sizes().equals(weight.sizes()), op, "gate", shape_of(weight) << " as weight", shape_of(gate),
                   "Pass the weights of both halves of one gated layer.");
}

inline void check_gate_bias(const char* op, const OptionalTensor& gate_bias, bool gated, const Tensor& like,
                            int64_t outputs) {
  if (!gate_bias) return;
  SAIT_CHECK_VALUE(gated, op, "gate_bias", "a gate to add it to", "a bias alone", "Leave it out, or pass the gate.");
  check_channels(op, "gate_bias", *gate_bias, like, outputs);
}

inline void check_packed(const char* op, const char* name, const Tensor& packed, const Tensor& like, int64_t inputs,
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

// A residual stream of `channels` channels with a row for each of the `rows` results, directly or by indices.
inline void check_residual(const char* op, const char* like_name, const Tensor& like, const char* name,
                           const Tensor& residual, const OptionalTensor& indices, int64_t channels) {
  check_rows(op, name, residual);
  check_same(op, name, residual, like_name, like);
  if (indices) check_indices(op, "selection.indices", *indices, residual, residual.size(0));
  const int64_t rows = like.size(0), selected = indices ? indices->size(0) : residual.size(0);
  SAIT_CHECK_VALUE(residual.size(1) == channels && selected == rows, op, name,
                   channels << " channels and a row for each of the " << rows << " of " << like_name,
                   shape_of(residual) << " and " << selected << " selected rows",
                   "Take them from one block, with the selection that made " << like_name << ".");
}

Tensor pack_linear(const Tensor& weight, const OptionalTensor& gate = std::nullopt);

// What precedes and follows the GEMM; nullptr is left out.
struct Around {
  const Tensor* norm_weight = nullptr;
  const Tensor* norm_bias = nullptr;
  double eps = 0;
  Activation activation = Activation::kNone;
  bool gated = false;
  const Tensor* gate_bias = nullptr;
  const Tensor* residual = nullptr;
  const Tensor* indices = nullptr;
  const Tensor* gamma = nullptr;
};

// Runs the kernel on arguments that were checked.
Tensor run_packed_linear(const Tensor& x, const Tensor& packed, int64_t outputs, const OptionalTensor& bias,
                         const Around& around);

}  // namespace sait
