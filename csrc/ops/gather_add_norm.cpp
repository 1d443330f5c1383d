// gather_add_norm: schema, checks, dispatch.
#include "sait/gather_add_norm.h"

#include "ops/common.h"

#ifdef SAIT_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace sait {
namespace {

void check_gather_add_norm(const Tensor& x, const Tensor& y, const Tensor& indices, const Tensor& weight,
                           const Tensor& bias, const OptionalTensor& gamma, double eps) {
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

// weight, bias and, where there is one, gamma, in one dtype.
struct Vectors {
  Contiguous weight, bias, gamma;

  Vectors(ScalarType type, const Tensor& weight, const Tensor& bias, const OptionalTensor& gamma)
      : weight(weight, type), bias(bias, type), gamma(or_null(gamma), type) {}
};

template <typename Vector>
GatherAddNormParamsOf<Vector> params_of(const Tensor& x, const Tensor& y, const Tensor& indices, const Vectors& vectors,
                                        double eps, const Tensor& residual, const Tensor& normed) {
  return {row_view(x),
          row_view(y),
          indices.const_data_ptr<int32_t>(),
          vectors.weight.data<Vector>(),
          vectors.bias.data<Vector>(),
          vectors.gamma.data<Vector>(),
          y.size(0),
          x.size(0),
          x.size(1),
          static_cast<float>(eps),
          dtype_of(x),
          residual.mutable_data_ptr(),
          normed.mutable_data_ptr()};
}

std::tuple<Tensor, Tensor> gather_add_norm(const Tensor& x, const Tensor& y, const Tensor& indices,
                                           const Tensor& weight, const Tensor& bias, const OptionalTensor& gamma,
                                           double eps) {
  check_gather_add_norm(x, y, indices, weight, bias, gamma, eps);
  const Tensor residual = allocate_like(y), normed = allocate_like(y);
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(x)) {
    // In 16 bits all of them, as a model in 16 bits has them, or in float32: a conversion is a launch for each.
    const auto as_rows = [&](const Tensor& t) { return t.scalar_type() == x.scalar_type(); };
    const bool all = as_rows(weight) && as_rows(bias) && (!gamma || as_rows(*gamma));
    const Vectors vectors(all ? x.scalar_type() : ScalarType::Float, weight, bias, gamma);
    const auto params = params_of<void>(x, y, indices, vectors, eps, residual, normed);
    const DType dtype = all ? dtype_of(x) : DType::kFloat32;
    launch("gather_add_norm", x, [&](void* stream) { return cuda::gather_add_norm(params, dtype, stream); });
    return {residual, normed};
  }
#endif
  const Vectors vectors(ScalarType::Float, weight, bias, gamma);
  cpu::gather_add_norm(params_of<float>(x, y, indices, vectors, eps, residual, normed));
  return {residual, normed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gather_add_norm_backward(const Tensor& grad_residual,
                                                                            const Tensor& grad_normed,
                                                                            const Tensor& residual, const Tensor& y,
                                                                            const Tensor& weight,
                                                                            const OptionalTensor& gamma, double eps) {
  constexpr const char* op = "gather_add_norm_backward";
  check_rows(op, "residual", residual);
  const auto check_like = [&](const char* name, const Tensor& t) {
    check_rows(op, name, t);
    check_same(op, name, t, "residual", residual);
    SAIT_CHECK_VALUE(t.sizes().equals(residual.sizes()), op, name, shape_of(residual) << " as residual", shape_of(t),
                     "Pass what the forward call took and returned.");
  };
  check_like("grad_residual", grad_residual);
  check_like("grad_normed", grad_normed);
  check_like("y", y);
  check_norm(op, residual, eps);
  check_channels(op, "weight", weight, residual, residual.size(1));
  if (gamma) check_channels(op, "gamma", *gamma, residual, residual.size(1));
  const Contiguous weights(weight, ScalarType::Float), gammas(or_null(gamma), ScalarType::Float);

  const int64_t rows = residual.size(0), channels = residual.size(1);
  const int64_t chunks = (rows + kGatherAddNormChunk - 1) / kGatherAddNormChunk;
  Tensor dresidual = allocate(residual, {rows, channels});
  Tensor dy = gamma ? allocate(residual, {rows, channels}) : allocate(residual, {0});
  const auto floats = [&](Sizes sizes) { return allocate(residual, sizes, ScalarType::Float); };
  Tensor dweight = floats({channels}), dbias = floats({channels}), dgamma = floats({gamma ? channels : 0});
  const Tensor partials = floats({chunks, 3, channels});
  cpu::gather_add_norm_backward(
      {row_view(residual), row_view(y), row_view(grad_residual), row_view(grad_normed), weights.data<float>(),
       gammas.data<float>(), rows, channels, static_cast<float>(eps), dtype_of(residual), dresidual.mutable_data_ptr(),
       gamma ? dy.mutable_data_ptr() : nullptr, dweight.mutable_data_ptr<float>(), dbias.mutable_data_ptr<float>(),
       dgamma.mutable_data_ptr<float>(), partials.mutable_data_ptr<float>()});
  return {dresidual, dy, dweight, dbias, dgamma};
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
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

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("gather_add_norm", sait::boxed<sait::gather_add_norm>);
  m.impl("gather_add_norm_backward", sait::boxed<sait::gather_add_norm_backward>);
}

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_gather_add_norm", sait::boxed_checks<sait::check_gather_add_norm>);
}

#ifdef SAIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sait, CUDA, m) { m.impl("gather_add_norm", sait::boxed<sait::gather_add_norm>); }
#endif
