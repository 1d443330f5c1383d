// What the op files share: argument checks with one form of message, and views of tensors for the kernels.
#pragma once

#include <cmath>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>

#include "ops/torch.h"
#include "sait/types.h"

namespace sait {

// "compact_attention: k: expected shape (197, 6, 64), got shape (196, 6, 64). Take q, k and v from one QKV projection."
// `expected` and `got` may be chains of <<; they are evaluated only when the check fails.
#define SAIT_MESSAGE(op, argument, expected, got, cure)                                                \
  ([&] {                                                                                               \
    std::ostringstream message;                                                                        \
    message << op << ": " << argument << ": expected " << expected << ", got " << got << ". " << cure; \
    return message.str();                                                                              \
  }())
#define SAIT_CHECK_VALUE(condition, ...)            \
  do {                                              \
    if (!(condition)) [[unlikely]]                  \
      raise_value_error(SAIT_MESSAGE(__VA_ARGS__)); \
  } while (false)
#define SAIT_CHECK_TYPE(condition, ...)            \
  do {                                             \
    if (!(condition)) [[unlikely]]                 \
      raise_type_error(SAIT_MESSAGE(__VA_ARGS__)); \
  } while (false)

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << "shape (";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << (t.dim() == 1 ? ",)" : ")");
  return s.str();
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat16;
  }
}

inline void check_dtype(const char* op, const char* name, const Tensor& t) {
  const auto type = t.scalar_type();
  SAIT_CHECK_TYPE(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, name,
                  "float32, bfloat16 or float16", type,
                  "Convert it, or use `with sait_kernels.backend(\"reference\")`, which runs any floating-point type.");
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  SAIT_CHECK_VALUE(t.shares_device(like), op, name, "device " << like.device() << " as " << like_name, t.device(),
                   "Move all arguments to one device.");
}

// Same device and dtype as `like`, the op's first tensor.
inline void check_same(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  check_device(op, name, t, like_name, like);
  SAIT_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, name,
                  "dtype " << like.scalar_type() << " as " << like_name, t.scalar_type(),
                  "Convert the arguments to one dtype.");
}

inline void check_last_contiguous(const char* op, const char* name, const Tensor& t) {
  SAIT_CHECK_VALUE(t.size(-1) <= 1 || t.stride(-1) == 1 || t.numel() == 0, op, name, "a contiguous last dimension",
                   "stride " << t.stride(-1) << " there", "Call .contiguous() on it.");
}

// (T, H, D) tensors: q, k, v.
inline void check_heads(const char* op, const char* name, const Tensor& t) {
  SAIT_CHECK_VALUE(t.dim() == 3, op, name, "a packed (T, H, D) tensor", shape_of(t),
                   "A batch (B, N, H, D) becomes packed by .flatten(0, 1).");
  check_dtype(op, name, t);
  SAIT_CHECK_VALUE(t.size(1) >= 1, op, name, "at least one head", shape_of(t),
                   "Take q, k and v from one QKV projection.");
  SAIT_CHECK_VALUE(t.size(2) >= 8 && t.size(2) % 8 == 0 && t.size(2) <= 256, op, name,
                   "a head dimension that is a multiple of 8, from 8 to 256", t.size(2),
                   "Pad q, k and v with zeros and pass the original scale.");
  check_last_contiguous(op, name, t);
}

inline void check_qkv_like(const char* op, const char* name, const Tensor& t, const Tensor& q) {
  check_same(op, name, t, "q", q);
  SAIT_CHECK_VALUE(t.sizes().equals(q.sizes()), op, name, shape_of(q) << " as q", shape_of(t),
                   "Take q, k and v from one QKV projection.");
  check_last_contiguous(op, name, t);
}

// (rows, C) tensors.
inline void check_rows(const char* op, const char* name, const Tensor& t) {
  SAIT_CHECK_VALUE(t.dim() == 2, op, name, "a packed (T, C) tensor", shape_of(t),
                   "A batch (B, N, C) becomes packed by .flatten(0, 1).");
  check_dtype(op, name, t);
  check_last_contiguous(op, name, t);
}

// One value per channel of `like`, the rows.
inline void check_channels(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t channels) {
  SAIT_CHECK_VALUE(t.dim() == 1 && t.size(0) == channels, op, name,
                   "shape (" << channels << ",), one value per channel", shape_of(t),
                   "Take it from a layer over these channels.");
  check_device(op, name, t, "the rows", like);
  check_dtype(op, name, t);
}

inline void check_eps(const char* op, const char* name, double eps) {
  const float eps32 = static_cast<float>(eps);
  SAIT_CHECK_VALUE(std::isfinite(eps32) && eps32 > 0, op, name, "a finite float32 > 0", eps,
                   "Pass the eps of the LayerNorm, such as 1e-6.");
}

// The rows and the eps of a LayerNorm.
inline void check_norm(const char* op, const Tensor& rows, double eps) {
  SAIT_CHECK_VALUE(rows.size(1) >= 1, op, "x", "at least one channel", shape_of(rows),
                   "There is nothing to normalise.");
  check_eps(op, "eps", eps);
}

// int32, 1-D, contiguous, on the device of `like`.
inline void check_int32_vector(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  SAIT_CHECK_VALUE(t.dim() == 1, op, name, "a 1-D tensor", shape_of(t), "Take one row of it, or .flatten() it.");
  SAIT_CHECK_TYPE(t.scalar_type() == ScalarType::Int, op, name, "dtype Int (int32)", t.scalar_type(),
                  "Convert with .int().");
  check_device(op, name, t, "the other arguments", like);
  SAIT_CHECK_VALUE(t.is_contiguous(), op, name, "a contiguous tensor", "stride " << t.stride(0),
                   "Call .contiguous() on it.");
}

// Rows behind the last offset are the tail: they belong to no image. The values are read only where that costs no
// synchronisation: on the CPU.
inline void check_cu_seqlens(const char* op, const char* name, const Tensor& cu, const Tensor& like, int64_t total,
                             int64_t max_seqlen, int64_t num_prefix, const char* bound = "max_seqlen") {
  check_int32_vector(op, name, cu, like);
  SAIT_CHECK_VALUE(cu.size(0) >= 1, op, name, "(B + 1,) offsets", shape_of(cu), "An empty batch is tensor([0]).");
  SAIT_CHECK_VALUE(max_seqlen >= 0, op, bound, "a bound >= 0", max_seqlen, "Pass the longest image's length.");
  SAIT_CHECK_VALUE(num_prefix >= 0, op, "num_prefix", "a number >= 0", num_prefix,
                   "Pass the number of class, distillation and register tokens.");
  if (!cu.is_cpu()) return;
  const int32_t* offsets = cu.const_data_ptr<int32_t>();
  const int64_t images = cu.size(0) - 1;
  SAIT_CHECK_VALUE(offsets[0] == 0, op, name, "a first value of 0", offsets[0], "Offsets count from the first row.");
  for (int64_t b = 0; b < images; ++b) {
    const int64_t n = static_cast<int64_t>(offsets[b + 1]) - offsets[b];
    SAIT_CHECK_VALUE(n >= 0, op, name, "ascending offsets", "a step of " << n << " at image " << b,
                     "They are the running sum of the images' lengths.");
    SAIT_CHECK_VALUE(n <= max_seqlen, op, bound, "at least " << n << ", the length of image " << b, max_seqlen,
                     "Pass the longest image's length.");
    SAIT_CHECK_VALUE(n == 0 || n >= num_prefix, op, "num_prefix", "at most " << n << ", the length of image " << b,
                     num_prefix, "An image has no rows at all, or all its prefix rows.");
  }
  SAIT_CHECK_VALUE(offsets[images] <= total, op, name, "a last value of at most " << total << ", the number of rows",
                   offsets[images], "They are the running sum of the images' lengths.");
}

// Ascending rows in [0, total), and behind them any number of times `total`, which is no row. Returns how many are
// rows; on a GPU, where the values are not read, how many may be.
inline int64_t check_indices(const char* op, const char* name, const Tensor& indices, const Tensor& like,
                             int64_t total) {
  check_int32_vector(op, name, indices, like);
  const int64_t size = indices.size(0);
  if (!indices.is_cpu()) return size;
  const int32_t* rows = indices.const_data_ptr<int32_t>();
  int64_t last = -1, present = 0;
  for (int64_t i = 0; i < size; ++i) {
    SAIT_CHECK_VALUE(rows[i] >= 0 && rows[i] <= total, op, name,
                     "rows in [0, " << total << "), then " << total << " for no row", rows[i] << " at position " << i,
                     "Take them from select_topk or select_mass on the same batch.");
    SAIT_CHECK_VALUE(rows[i] > last || rows[i] == total, op, name, "ascending rows without repetition",
                     rows[i] << " after " << last << " at position " << i, "Sort them.");
    last = rows[i];
    present += rows[i] < total;
  }
  return present;
}

// Positions of rotate: rows of a table, or -1. The values are read only where that costs no synchronisation: on the CPU.
inline void check_positions(const char* op, const Tensor& positions, const Tensor& like, int64_t entries) {
  check_int32_vector(op, "positions", positions, like);
  SAIT_CHECK_VALUE(positions.size(0) == like.size(0), op, "positions", like.size(0) << ", one for each row",
                   positions.size(0), "It is -1 where a row has none.");
  if (!positions.is_cpu()) return;
  const int32_t* values = positions.const_data_ptr<int32_t>();
  for (int64_t t = 0; t < positions.size(0); ++t) {
    SAIT_CHECK_VALUE(values[t] >= -1 && values[t] < entries, op, "positions",
                     "rows of the table in [0, " << entries << "), or -1 for none", values[t] << " at row " << t,
                     "Make the table for the size of these images.");
  }
}

// Writes zeros to the rows from `first` on, of a contiguous tensor on the CPU: what an op owes to rows of the tail.
inline void zero_tail(const Tensor& t, int64_t first) {
  const int64_t rows = t.size(0);
  if (first >= rows) return;
  const size_t bytes = t.numel() / rows * t.element_size();
  std::memset(t.mutable_data_ptr<char>() + first * bytes, 0, (rows - first) * bytes);
}

// The factor of q . k: D ** -0.5 by default.
inline double check_scale(const char* op, std::optional<double> scale, int64_t head_dim) {
  SAIT_CHECK_VALUE(!scale || std::isfinite(static_cast<float>(*scale)), op, "scale", "a finite float32", *scale,
                   "None means head_dim ** -0.5.");
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

inline HeadView head_view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
inline RowView row_view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }
inline Batch batch_view(const Tensor& cu_seqlens, int64_t max_seqlen) {
  return {cu_seqlens.const_data_ptr<int32_t>(), cu_seqlens.size(0) - 1, max_seqlen};
}

}  // namespace sait
