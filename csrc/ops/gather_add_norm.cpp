// gather_add_norm: schema, checks, dispatch.
#include "sait/gather_add_norm.h"

#include "ops/common.h"

#ifdef SAIT_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace sait {
namespace {

void check_gather_add_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& indices,
                           const at::Tensor& weight, const at::Tensor& bias, const std::optional<at::Tensor>& gamma,
                           double eps) {
  constexpr const char* op = "gather_add_norm";
  check_rows(op, "x", x);
  check_rows(op, "y", y);
  check_same(op, "y", y, "x", x);
  SAIT_CHECK_VALUE(y.size(1) == x.size(1), op, "y", x.size(1) << " channels as x", shape_of(y),
                   "y is added to rows of x.");
  check_indices(op, "selection.indices", indices, x, x.size(0));
  SAIT_CHECK_VALUE(y.size(0) == indices.size(0), op, "y", indices.size(0) << " rows, one per selected row", shape_of(y),
                   "Compute y with the same selection.");
  check_norm(op, x, eps);
  check_channels(op, "weight", weight, x, x.size(1));
  check_channels(op, "bias", bias, x, x.size(1));
  if (gamma) check_channels(op, "gamma", *gamma, x, x.size(1));
}

// weight, bias and, where it is defined, gamma, contiguous and in one dtype.
struct Vectors {
  at::Tensor weight, bias, gamma;
};

Vectors vectors_in(at::ScalarType dtype, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& gamma) {
  const auto in_dtype = [dtype](const at::Tensor& t) { return t.to(dtype).contiguous(); };
  return {in_dtype(weight), in_dtype(bias), gamma ? in_dtype(*gamma) : at::Tensor()};
}

template <typename Vector>
GatherAddNormParamsOf<Vector> params_of(const at::Tensor& x, const at::Tensor& y, const at::Tensor& indices,
                                        const Vectors& vectors, double eps, const at::Tensor& residual,
                                        const at::Tensor& normed) {
  const auto data = [](const at::Tensor& t) {
    return t.defined() ? static_cast<const Vector*>(t.const_data_ptr()) : nullptr;
  };
  return {row_view(x),
          row_view(y),
          indices.const_data_ptr<int32_t>(),
          data(vectors.weight),
          data(vectors.bias),
          data(vectors.gamma),
          y.size(0),
          x.size(0),
          x.size(1),
          static_cast<float>(eps),
          dtype_of(x),
          residual.mutable_data_ptr(),
          normed.mutable_data_ptr()};
}

std::tuple<at::Tensor, at::Tensor> gather_add_norm(const at::Tensor& x, const at::Tensor& y, const at::Tensor& indices,
                                                   const at::Tensor& weight, const at::Tensor& bias,
                                                   const std::optional<at::Tensor>& gamma, double eps) {
  check_gather_add_norm(x, y, indices, weight, bias, gamma, eps);
  const at::Tensor residual = at::empty(y.sizes(), y.options()), normed = at::empty(y.sizes(), y.options());
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(x)) {
    // In 16 bits all of them, as a model in 16 bits has them, or in float32: a conversion is a launch for each.
    const auto as_rows = [&](const at::Tensor& t) { return t.scalar_type() == x.scalar_type(); };
    const bool all = as_rows(weight) && as_rows(bias) && (!gamma || as_rows(*gamma));
    const Vectors vectors = vectors_in(all ? x.scalar_type() : at::kFloat, weight, bias, gamma);
    const auto params = params_of<void>(x, y, indices, vectors, eps, residual, normed);
    const DType dtype = dtype_of(vectors.weight);
    launch("gather_add_norm", x, [&](void* stream) { return cuda::gather_add_norm(params, dtype, stream); });
    return {residual, normed};
  }
#endif
  const Vectors vectors = vectors_in(at::kFloat, weight, bias, gamma);
  cpu::gather_add_norm(params_of<float>(x, y, indices, vectors, eps, residual, normed));
  return {residual, normed};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gather_add_norm_backward(
    const at::Tensor& grad_residual, const at::Tensor& grad_normed, const at::Tensor& residual, const at::Tensor& y,
    const at::Tensor& weight, const std::optional<at::Tensor>& gamma, double eps) {
  constexpr const char* op = "gather_add_norm_backward";
  check_rows(op, "residual", residual);
  const auto check_like = [&](const char* name, const at::Tensor& t) {
    check_rows(op, name, t);
    check_same(op, name, t, "residual", residual);
    SAIT_CHECK_VALUE(t.sizes() == residual.sizes(), op, name, shape_of(residual) << " as residual", shape_of(t),
                     "Pass what the forward call took and returned.");
  };
  check_like("grad_residual", grad_residual);
  check_like("grad_normed", grad_normed);
  check_like("y", y);
  check_norm(op, residual, eps);
  check_channels(op, "weight", weight, residual, residual.size(1));
  if (gamma) check_channels(op, "gamma", *gamma, residual, residual.size(1));
  const at::Tensor weights = channel_vector(weight), gammas = gamma ? channel_vector(*gamma) : at::Tensor();

  const int64_t rows = residual.size(0), channels = residual.size(1);
  const int64_t chunks = (rows + kGatherAddNormChunk - 1) / kGatherAddNormChunk;
  at::Tensor dresidual = at::empty({rows, channels}, residual.options());
  at::Tensor dy = gamma ? at::empty({rows, channels}, residual.options()) : at::empty({0}, residual.options());
  at::Tensor dweight = at::empty({channels}, weights.options()), dbias = at::empty({channels}, weights.options());
  at::Tensor dgamma = at::empty({gamma ? channels : 0}, weights.options());
  const at::Tensor partials = at::empty({chunks, 3, channels}, weights.options());
  cpu::gather_add_norm_backward(
      {row_view(residual), row_view(y), row_view(grad_residual), row_view(grad_normed), weights.const_data_ptr<float>(),
       gamma ? gammas.const_data_ptr<float>() : nullptr, rows, channels, static_cast<float>(eps), dtype_of(residual),
       dresidual.mutable_data_ptr(), gamma ? dy.mutable_data_ptr() : nullptr, dweight.mutable_data_ptr<float>(),
       dbias.mutable_data_ptr<float>(), dgamma.mutable_data_ptr<float>(), partials.mutable_data_ptr<float>()});
  return {dresidual, dy, dweight, dbias, dgamma};
}

}  // namespace
}  // namespace sait

TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "gather_add_norm(Tensor x, Tensor y, Tensor indices, Tensor weight, Tensor bias, Tensor? gamma, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "gather_add_norm_backward(Tensor grad_residual, Tensor grad_normed, Tensor residual, Tensor y, Tensor weight, "
      "Tensor? gamma, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_check_gather_add_norm(Tensor x, Tensor y, Tensor indices, Tensor weight, Tensor bias, Tensor? gamma, float "
      "eps) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("gather_add_norm", sait::gather_add_norm);
  m.impl("gather_add_norm_backward", sait::gather_add_norm_backward);
}

TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_gather_add_norm", sait::check_gather_add_norm);
}

#ifdef SAIT_WITH_CUDA
TORCH_LIBRARY_IMPL(sait, CUDA, m) { m.impl("gather_add_norm", sait::gather_add_norm); }
#endif
