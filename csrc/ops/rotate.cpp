// rotate: schema, checks, dispatch.
#include "sait/rotate.h"

#include "ops/common.h"

#ifdef SAIT_WITH_CUDA
#include "ops/cuda.h"
#endif

namespace sait {
namespace {

void check(const char* op, const char* q_name, const char* k_name, const Tensor& q, const Tensor& k,
           const Tensor& positions, const Tensor& table) {
  SAIT_CHECK_VALUE(q.dim() == 3, op, q_name, "a packed (T, H, D) tensor", shape_of(q),
                   "View a projection as heads: x.unflatten(1, (heads, head_dim)).");
  check_dtype(op, q_name, q);
  const int64_t heads = q.size(1), head_dim = q.size(2);
  SAIT_CHECK_VALUE(heads >= 1, op, q_name, "at least one head", shape_of(q), "Take q and k from one QKV projection.");
  SAIT_CHECK_VALUE(head_dim >= 2 && head_dim % 2 == 0, op, q_name, "an even head dimension", head_dim,
                   "Two channels turn together.");
  check_last_contiguous(op, q_name, q);
  check_same(op, k_name, k, q_name, q);
  SAIT_CHECK_VALUE(k.sizes().equals(q.sizes()), op, k_name, shape_of(q) << " as " << q_name, shape_of(k),
                   "Take q and k from one QKV projection.");
  check_last_contiguous(op, k_name, k);

  const bool each_head = table.dim() == 3;
  SAIT_CHECK_VALUE(
      (table.dim() == 2 || each_head) && table.size(-1) == 2 * head_dim && (!each_head || table.size(0) == heads), op,
      "table", "shape (P, " << 2 * head_dim << ") or (" << heads << ", P, " << 2 * head_dim << "), sin then cos",
      shape_of(table), "Repeat the frequencies so that each channel has its own.");
  check_device(op, "table", table, q_name, q);
  SAIT_CHECK_TYPE(table.scalar_type() == ScalarType::Float, op, "table", "dtype Float (float32)", table.scalar_type(),
                  "Make it with .float(), from the start.");
  check_last_contiguous(op, "table", table);
  check_positions(op, positions, q, table.size(-2));
}

void check_rotate(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& table, bool) {
  check("rotate", "q", "k", q, k, positions, table);
}

std::tuple<Tensor, Tensor> run(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions,
                               const Tensor& table, bool pairs, bool transposed) {
  const Tensor q_out = allocate_like(q), k_out = allocate_like(q);
  const RotateParams params{head_view(q),
                            head_view(k),
                            positions.const_data_ptr<int32_t>(),
                            table.const_data_ptr<float>(),
                            table.stride(-2),
                            table.dim() == 3 ? table.stride(0) : 0,
                            q.size(0),
                            q.size(1),
                            q.size(2),
                            table.size(-2),
                            pairs,
                            transposed,
                            dtype_of(q),
                            q_out.mutable_data_ptr(),
                            k_out.mutable_data_ptr()};
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(q)) {
    launch(op, q, [&](void* stream) { return cuda::rotate(params, stream); });
    return {q_out, k_out};
  }
#endif
  cpu::rotate(params);
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rotate(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& table,
                                  bool pairs) {
  check_rotate(q, k, positions, table, pairs);
  return run("rotate", q, k, positions, table, pairs, /*transposed=*/false);
}

std::tuple<Tensor, Tensor> rotate_backward(const Tensor& grad_q, const Tensor& grad_k, const Tensor& positions,
                                           const Tensor& table, bool pairs) {
  check("rotate_backward", "grad_q", "grad_k", grad_q, grad_k, positions, table);
  return run("rotate_backward", grad_q, grad_k, positions, table, pairs, /*transposed=*/true);
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def("rotate(Tensor q, Tensor k, Tensor positions, Tensor table, bool pairs) -> (Tensor, Tensor)");
  m.def(
      "rotate_backward(Tensor grad_q, Tensor grad_k, Tensor positions, Tensor table, bool pairs) -> (Tensor, Tensor)");
  m.def("_check_rotate(Tensor q, Tensor k, Tensor positions, Tensor table, bool pairs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("rotate", sait::boxed<sait::rotate>);
  m.impl("rotate_backward", sait::boxed<sait::rotate_backward>);
}

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_rotate", sait::boxed_checks<sait::check_rotate>);
}

#ifdef SAIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sait, CUDA, m) {
  m.impl("rotate", sait::boxed<sait::rotate>);
  m.impl("rotate_backward", sait::boxed<sait::rotate_backward>);
}
#endif
