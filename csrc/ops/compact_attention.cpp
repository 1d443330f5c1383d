// compact_attention and its backward: schema, checks, dispatch.
#include "ops/compact_attention.h"

namespace sait {
namespace {

// The rows that stay, checked against the batch: indices and kept_cu_seqlens come together.
Kept check_kept(const char* op, const Tensor& q, const Tensor& cu_seqlens, const OptionalTensor& indices,
                const OptionalTensor& kept_cu_seqlens) {
  SAIT_CHECK_VALUE(indices.has_value() == kept_cu_seqlens.has_value(), op, "selection",
                   "indices and cu_seqlens together", "only one of them", "Pass a whole Selection, or None.");
  if (!indices) return {nullptr, cu_seqlens.const_data_ptr<int32_t>(), q.size(0)};
  const int64_t present = check_indices(op, "selection.indices", *indices, q, q.size(0));
  check_int32_vector(op, "selection.cu_seqlens", *kept_cu_seqlens, q);
  SAIT_CHECK_VALUE(kept_cu_seqlens->size(0) == cu_seqlens.size(0), op, "selection.cu_seqlens",
                   "(B + 1,) = " << cu_seqlens.size(0) << " offsets", kept_cu_seqlens->size(0),
                   "Take the selection from the same batch.");
  const Kept kept{indices->const_data_ptr<int32_t>(), kept_cu_seqlens->const_data_ptr<int32_t>(), indices->size(0)};
  if (q.is_cpu()) {
    const int32_t* images = cu_seqlens.const_data_ptr<int32_t>();
    const int64_t count = cu_seqlens.size(0) - 1;
    SAIT_CHECK_VALUE(kept.cu_seqlens[0] == 0 && kept.cu_seqlens[count] == present, op, "selection.cu_seqlens",
                     "offsets from 0 to " << present << ", the rows of selection.indices",
                     kept.cu_seqlens[0] << " to " << kept.cu_seqlens[count], "Take the selection from the same batch.");
    for (int64_t b = 0; b < count; ++b) {
      const int32_t first = kept.cu_seqlens[b], last = kept.cu_seqlens[b + 1];
      SAIT_CHECK_VALUE(first <= last && last <= present, op, "selection.cu_seqlens", "ascending offsets",
                       first << " before " << last << " at image " << b, "Take the selection from the same batch.");
      SAIT_CHECK_VALUE(first == last || (kept.indices[first] >= images[b] && kept.indices[last - 1] < images[b + 1]),
                       op, "selection.indices", "rows [" << images[b] << ", " << images[b + 1] << ") for image " << b,
                       "rows " << kept.indices[first] << " to " << kept.indices[last - 1],
                       "Take the selection from the same batch.");
    }
  }
  return kept;
}

// Strided as well: it is copied where it is not contiguous.
void check_key_bias(const char* op, const OptionalTensor& key_bias, const Tensor& q) {
  if (!key_bias) return;
  SAIT_CHECK_VALUE(key_bias->dim() == 1 && key_bias->size(0) == q.size(0), op, "key_bias",
                   "shape (" << q.size(0) << ",), one value for each row of k", shape_of(*key_bias),
                   "It is one for all heads and queries; a batch (B, N) becomes packed by .flatten().");
  check_device(op, "key_bias", *key_bias, "q", q);
  SAIT_CHECK_TYPE(key_bias->scalar_type() == ScalarType::Float, op, "key_bias", "dtype Float (float32)",
                  key_bias->scalar_type(), "Convert with .float().");
}

struct Checked {
  Kept kept;
  double scale;
};

Checked check_compact_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                int64_t max_seqlen, const OptionalTensor& indices,
                                const OptionalTensor& kept_cu_seqlens, std::optional<double> scale,
                                const OptionalTensor& key_bias) {
  constexpr const char* op = "compact_attention";
  const double factor = check_attention(op, q, k, v, cu_seqlens, max_seqlen, 0, scale);
  check_key_bias(op, key_bias, q);
  return {check_kept(op, q, cu_seqlens, indices, kept_cu_seqlens), factor};
}

Tensor compact_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                         int64_t max_seqlen, const OptionalTensor& indices, const OptionalTensor& kept_cu_seqlens,
                         std::optional<double> scale, const OptionalTensor& key_bias) {
  const auto [kept, factor] =
      check_compact_attention(q, k, v, cu_seqlens, max_seqlen, indices, kept_cu_seqlens, scale, key_bias);
  Tensor out = allocate(q, {kept.rows, q.size(1) * q.size(2)});
#ifdef SAIT_WITH_CUDA
  if (runs_on_cuda(q)) {
    check_cuda_attention("compact_attention", q);
    SAIT_CHECK_VALUE(!key_bias, "compact_attention", "key_bias", "None for the CUDA kernel", shape_of(*key_bias),
                     "Use the triton backend.");
    if (cu_seqlens.size(0) == 1) {  // no block would see to the tail
      set_to_zero(out);
      return out;
    }
    const Tensor queries = aligned(q), keys = aligned(k), values = aligned(v);
    const CompactAttentionParams params =
        attention_params(queries, keys, values, cu_seqlens, max_seqlen, kept, factor, out.mutable_data_ptr());
    launch("compact_attention", q, [&](void* stream) { return cuda::compact_attention(params, stream); });
    return out;
  }
#endif
  const Contiguous biases(or_null(key_bias), ScalarType::Float);
  CompactAttentionParams params =
      attention_params(q, k, v, cu_seqlens, max_seqlen, kept, factor, out.mutable_data_ptr());
  params.key_bias = biases.data<float>();
  cpu::compact_attention(params);
  zero_tail(out, kept.cu_seqlens[cu_seqlens.size(0) - 1]);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t max_seqlen,
    const OptionalTensor& indices, const OptionalTensor& kept_cu_seqlens, std::optional<double> scale,
    const OptionalTensor& key_bias) {
  constexpr const char* op = "compact_attention_backward";
  const double factor = check_attention(op, q, k, v, cu_seqlens, max_seqlen, 0, scale);
  const Kept kept = check_kept(op, q, cu_seqlens, indices, kept_cu_seqlens);
  check_key_bias(op, key_bias, q);
  check_rows(op, "grad", grad);
  check_same(op, "grad", grad, "q", q);
  SAIT_CHECK_VALUE(grad.size(0) == kept.rows && grad.size(1) == q.size(1) * q.size(2), op, "grad",
                   "shape (" << kept.rows << ", " << q.size(1) * q.size(2) << ") as the output", shape_of(grad), "");
  Tensor dq = allocate_like(q), dk = allocate_like(k), dv = allocate_like(v);
  Tensor dkey_bias = allocate(q, {key_bias ? q.size(0) : 0}, ScalarType::Float);
  const Contiguous biases(or_null(key_bias), ScalarType::Float);
  CompactAttentionBackwardParams params{attention_params(q, k, v, cu_seqlens, max_seqlen, kept, factor, nullptr),
                                        {grad.const_data_ptr(), grad.stride(0), q.size(2)},
                                        dq.mutable_data_ptr(),
                                        dk.mutable_data_ptr(),
                                        dv.mutable_data_ptr()};
  OptionalTensor head_sums;
  if (key_bias) {
    head_sums = allocate(q, {q.size(1), q.size(0)}, ScalarType::Float);
    params.forward.key_bias = biases.data<float>();
    params.dkey_bias = dkey_bias.mutable_data_ptr<float>();
    params.head_sums = head_sums->mutable_data_ptr<float>();
  }
  cpu::compact_attention_backward(params);
  const int64_t tail = cu_seqlens.const_data_ptr<int32_t>()[cu_seqlens.size(0) - 1];
  for (const Tensor& t : {dq, dk, dv}) zero_tail(t, tail);
  zero_tail(dkey_bias, tail);
  return {dq, dk, dv, dkey_bias};
}

}  // namespace
}  // namespace sait

STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) {
  m.def(
      "compact_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, Tensor? indices=None, "
      "Tensor? kept_cu_seqlens=None, float? scale=None, Tensor? key_bias=None) -> Tensor");
  m.def(
      "compact_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, "
      "Tensor? indices=None, Tensor? kept_cu_seqlens=None, float? scale=None, Tensor? key_bias=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_check_compact_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, Tensor? indices=None, "
      "Tensor? kept_cu_seqlens=None, float? scale=None, Tensor? key_bias=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sait, CPU, m) {
  m.impl("compact_attention", sait::boxed<sait::compact_attention>);
  m.impl("compact_attention_backward", sait::boxed<sait::compact_attention_backward>);
}

#ifdef SAIT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sait, CUDA, m) { m.impl("compact_attention", sait::boxed<sait::compact_attention>); }
#endif

STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) {
  m.impl("_check_compact_attention", sait::boxed_checks<sait::check_compact_attention>);
}
