// What the ops around packed_linear share: checks of a linear layer's parameters, and the call of the kernel.
#pragma once

#include "ops/common.h"
#include "sait/packed_linear.h"

namespace sait {

// The parameters of a linear layer over the rows of x, which the op calls `name`.
inline void check_linear(const char* op, const char* name, const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias) {
  check_rows(op, "weight", weight);
  check_same(op, "weight", weight, name, x);
  SAIT_CHECK_VALUE(weight.size(1) == x.size(1) && x.size(1) >= 1, op, "weight",
                   "shape (O, " << x.size(1) << "), the channels of " << name << ", at least one", shape_of(weight),
                   "Pass Linear.weight.");
  if (bias) check_channels(op, "bias", *bias, x, weight.size(0));
}

// A residual stream of `channels` channels with a row for each of the `rows` results, directly or by indices.
inline void check_residual(const char* op, const char* like_name, const at::Tensor& like, const char* name,
                           const at::Tensor& residual, const std::optional<at::Tensor>& indices, int64_t channels) {
  check_rows(op, name, residual);
  check_same(op, name, residual, like_name, like);
  if (indices) check_indices(op, "selection.indices", *indices, residual, residual.size(0));
  const int64_t rows = like.size(0), selected = indices ? indices->size(0) : residual.size(0);
  SAIT_CHECK_VALUE(residual.size(1) == channels && selected == rows, op, name,
                   channels << " channels and a row for each of the " << rows << " of " << like_name,
                   shape_of(residual) << " and " << selected << " selected rows",
                   "Take them from one block, with the selection that made " << like_name << ".");
}

at::Tensor pack_linear(const at::Tensor& weight);

// What follows and precedes the product; tensors that are left out are undefined.
struct Around {
  at::Tensor norm_weight, norm_bias;
  double eps = 0;
  bool gelu = false;
  at::Tensor residual, indices, gamma;
};

// Runs the kernel on arguments that were checked.
at::Tensor run_packed_linear(const at::Tensor& x, const at::Tensor& packed, int64_t outputs,
                             const std::optional<at::Tensor>& bias, const Around& around);

}  // namespace sait
