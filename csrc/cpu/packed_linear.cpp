// packed_linear on the CPU: a block of rows is normalised once, stays in the cache, and meets one block of columns of
// the weight after the other. What follows the product is done on its float tile of 24 KiB, before the result is rounded
// and written once.
//
// bfloat16 uses bfloat16 products where the machine has them; everything else computes in float32.
#define SAIT_KERNEL_FILE "cpu/packed_linear.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "cpu/gemm.h"
#include "sait/packed_linear.h"

namespace sait::cpu::SAIT_ISA {
namespace linear {

// A block of rows and a block of columns, of 1,536 inputs each, leave room in 1 MiB of L2. brgemm takes six rows at a
// time: 96 is a multiple.
constexpr int64_t kMaxBlock = 96;
constexpr int64_t kBlockBytes = 256 * 1024;
constexpr int64_t kMaxSum = 256;

// x Phi(x) = max(x, 0) - a Phi(-a) with a = |x|, which loses no digits where Phi(x) is nearly 0. Phi(-a) = exp(-a^2 / 2)
// M(a), and with y = 1 / (1 + 0.3 a) M(a) is y times a polynomial of y, off by 5e-8 of its value (minimax, a <= 8).
template <bool kBFloat16Result>
inline Vec gelu(Vec x) {
  constexpr float kMills[] = {0.11961029f,  0.12104787f, 0.09807437f,  0.13463151f,
                              -0.06514996f, 0.21880573f, -0.16443044f, 0.03741066f};
  constexpr float kHalfLog2e = 0.72134752f;
  const Vec a = min(max(x, set(0.f) - x), set(16.f));  // beyond 16 the second term is 0, and infinity times 0 is none
  const Vec y = set(1.f) / fma(a, set(0.3f), set(1.f));
  Vec mills = set(kMills[7]);
  for (int i = 6; i >= 0; --i) mills = fma(mills, y, set(kMills[i]));
  const Vec tail = exp2<kBFloat16Result>(a * a * set(-kHalfLog2e)) * mills * y;
  return max(set(0.f), x) - a * tail;  // in this order a NaN stays a NaN
}

// The value that a row of type E would hold.
template <typename E>
inline Vec rounded(Vec a) {
  if constexpr (std::is_same_v<E, F32>) return a;
  else return widen(narrow(a, E::dtype), E::dtype);
}

// Where a product reads its rows, and how far apart they are.
template <typename P>
struct Rows {
  const typename P::type* data;
  int64_t stride;
};

// Rows [first, first + rows) as type P, normalised where that is asked for; zeros in columns up to `depth` and rows up
// to `padded`.
template <typename E, typename P>
Rows<P> load_rows(const PackedLinearParams& p, int64_t first, int64_t rows, int64_t padded, int64_t depth) {
  using T = typename E::type;
  const T* x = static_cast<const T*>(p.x.data) + first * p.x.row_stride;
  if constexpr (std::is_same_v<E, P>) {
    if (p.norm_weight == nullptr && rows == padded && p.inputs == depth) return {x, p.x.row_stride};
  }
  auto* block = scratch<typename P::type, 0>(kMaxBlock * depth);
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x + i * p.x.row_stride;
    auto* out = block + i * depth;
    if (p.norm_weight == nullptr) {
      for_each_vec(p.inputs, [=](int64_t k, int n) { store_lanes<P>(out + k, load_lanes<E>(row + k, n), n); });
    } else {
      const float sum = sum_over(p.inputs, [=](int64_t k, int n) { return load_lanes<E>(row + k, n); });
      const Moments m = moments<E>(row, sum, p.inputs, p.eps);
      for_each_vec(p.inputs, [=, &p](int64_t k, int n) {
        const Vec standard = (load_lanes<E>(row + k, n) - set(m.mean)) * set(m.rstd);
        const Vec normed = fma(standard, load_lanes<F32>(p.norm_weight + k, n), load_lanes<F32>(p.norm_bias + k, n));
        store_lanes<P>(out + k, rounded<E>(normed), n);
      });
    }
    std::fill(out + p.inputs, out + depth, 0);
  }
  std::fill(block + rows * depth, block + padded * depth, 0);
  return {block, depth};
}

// A block of columns as type P: (depth, kPackedColumns), in pairs of inputs where P has two bytes.
template <typename E, typename P>
const typename P::type* load_columns(const PackedLinearParams& p, int64_t block, int64_t depth) {
  const auto* packed = static_cast<const typename E::type*>(p.packed) + block * depth * kPackedColumns;
  if constexpr (std::is_same_v<E, P>) {
    return packed;
  } else {
    float* columns = scratch<float, 1>(depth * kPackedColumns);
    float pairs[2 * kPackedColumns];
    for (int64_t k = 0; k < depth; k += 2) {
      float* out = columns + k * kPackedColumns;
      const auto* in = packed + k * kPackedColumns;
      for (int64_t i = 0; i < 2 * kPackedColumns; i += kWidth) store(pairs + i, load_as<E>(in + i));
      for (int64_t n = 0; n < kPackedColumns; ++n) {
        out[n] = pairs[2 * n];
        out[kPackedColumns + n] = pairs[2 * n + 1];
      }
    }
    return columns;
  }
}

// In float the inputs are summed in parts: the error of a sum grows with its length, and torch sums in parts, too. Of
// bfloat16 the inputs' own rounding is far larger.
template <typename P>
void multiply(int64_t rows, int64_t depth, Rows<P> a, const typename P::type* columns, float* tile) {
  constexpr int64_t N = kPackedColumns;
  if constexpr (std::is_same_v<P, BF16>) {
    brgemm_bf16(rows, N, depth, a.data, a.stride, columns, N, tile, N, false);
  } else {
    const int64_t parts = (depth + kMaxSum - 1) / kMaxSum, part = (depth + parts - 1) / parts;
    for (int64_t k = 0; k < depth; k += part) {
      gemm_f32(rows, N, std::min(part, depth - k), a.data + k, a.stride, columns + k * N, N, tile, N, k > 0);
    }
  }
}

// What is added to row t, from `column` on; nullptr for nothing.
template <typename E>
inline const typename E::type* residual_of(const PackedLinearParams& p, int64_t t, int64_t column) {
  const int64_t row = p.indices == nullptr ? t : p.indices[t];
  if (p.residual.data == nullptr || row >= p.total) return nullptr;
  return static_cast<const typename E::type*>(p.residual.data) + row * p.residual.row_stride + column;
}

// Asks for a tile's part of the residual and of the result before its product: rows of 128 bytes that lie far apart are
// nothing that the hardware foresees, and by the time the product is done they are there.
template <typename E>
void prefetch(const PackedLinearParams& p, int64_t first, int64_t rows, int64_t column) {
  using T = typename E::type;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t t = first; t < first + rows; ++t) {
    const T* residual = residual_of<E>(p, t, column);
    const T* out = static_cast<const T*>(p.out) + t * p.outputs + column;
    for (int64_t i = 0; i < std::min(kPackedColumns, p.outputs - column); i += kLine) {
      if (residual != nullptr) __builtin_prefetch(residual + i, 0);
      __builtin_prefetch(out + i, 1);
    }
  }
}

// Bias, GELU, gamma and residual of a tile of rows from `first` and columns from `column` on.
template <typename E>
void finish(const PackedLinearParams& p, int64_t first, int64_t rows, int64_t column, const float* tile) {
  using T = typename E::type;
  const auto from_column = [=](const float* vector) { return vector == nullptr ? nullptr : vector + column; };
  const float *bias = from_column(p.bias), *gamma = from_column(p.gamma);
  const int64_t columns = std::min(kPackedColumns, p.outputs - column);
  for (int64_t t = first; t < first + rows; ++t, tile += kPackedColumns) {
    const T* residual = residual_of<E>(p, t, column);
    T* out = static_cast<T*>(p.out) + t * p.outputs + column;
    for_each_vec(columns, [=, &p](int64_t i, int n) {
      Vec value = load(tile + i);
      if (bias != nullptr) value = value + load_lanes<F32>(bias + i, n);
      if (p.gelu) value = gelu<std::is_same_v<E, BF16>>(value);
      if (gamma != nullptr) value = value * load_lanes<F32>(gamma + i, n);
      if (residual != nullptr) value = value + load_lanes<E>(residual + i, n);
      store_lanes<E>(out + i, value, n);
    });
  }
}

// How the result is cut: blocks of equal numbers of rows, so that little is padding and threads have equal work, times
// groups of blocks of columns. Each element is one sum in one order, so none of this changes a bit of it.
struct Cut {
  int64_t block, blocks, groups;
};

Cut cut(const PackedLinearParams& p, int64_t row_bytes, int64_t threads) {
  const int64_t most = std::clamp<int64_t>(kBlockBytes / row_bytes, 16, kMaxBlock) / kRowAlign * kRowAlign;
  const int64_t whole = (p.rows + most - 1) / most;
  const int64_t block = round_up((p.rows + whole - 1) / whole, kRowAlign);
  const int64_t blocks = (p.rows + block - 1) / block;
  const int64_t groups = std::clamp<int64_t>(2 * threads / blocks, 1, packed_blocks(p.outputs));
  return {block, blocks, groups};
}

template <typename E, typename P>
void run(const PackedLinearParams& p) {
  const int64_t depth = packed_depth(p.inputs, p.dtype), column_blocks = packed_blocks(p.outputs);
  const Cut parts = cut(p, depth * sizeof(typename P::type), num_threads());
  parallel_for(parts.blocks * parts.groups, 1, [&](int64_t begin, int64_t end) {
    float* tile = scratch<float, 2>(kMaxBlock * kPackedColumns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / parts.groups * parts.block, group = task % parts.groups;
      const int64_t rows = std::min(parts.block, p.rows - first), padded = round_up(rows, kRowAlign);
      const Rows<P> block = load_rows<E, P>(p, first, rows, padded, depth);
      const int64_t last = column_blocks * (group + 1) / parts.groups;
      for (int64_t b = column_blocks * group / parts.groups; b < last; ++b) {
        prefetch<E>(p, first, rows, b * kPackedColumns);
        multiply<P>(padded, depth, block, load_columns<E, P>(p, b, depth), tile);
        finish<E>(p, first, rows, b * kPackedColumns, tile);
      }
    }
    release_gemm();
  });
}

}  // namespace linear

void packed_linear(const PackedLinearParams& p) {
  visit_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
#if defined(SAIT_VEC_AVX512_BF16)
    if (std::is_same_v<E, BF16> && has_brgemm_bf16()) return linear::run<BF16, BF16>(p);
#endif
    linear::run<E, F32>(p);
  });
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

// T is an unsigned integer of the type's size: packing moves bits.
template <typename T, int64_t kPair>
void pack_blocks(const PackLinearParams& p, int64_t begin, int64_t end) {
  const int64_t depth = packed_depth(p.inputs, p.dtype);
  for (int64_t b = begin; b < end; ++b) {
    T* block = static_cast<T*>(p.packed) + b * depth * kPackedColumns;
    std::fill(block, block + depth * kPackedColumns, T(0));
    for (int64_t n = 0; n < std::min(kPackedColumns, p.outputs - b * kPackedColumns); ++n) {
      const T* row = static_cast<const T*>(p.weight.data) + (b * kPackedColumns + n) * p.weight.row_stride;
      for (int64_t k = 0; k < p.inputs; ++k) {
        block[k / kPair * kPair * kPackedColumns + kPair * n + k % kPair] = row[k];
      }
    }
  }
}

}  // namespace

void pack_linear(const PackLinearParams& p) {
  parallel_for(packed_blocks(p.outputs), 1, [&](int64_t begin, int64_t end) {
    if (p.dtype == DType::kFloat32) pack_blocks<uint32_t, 1>(p, begin, end);
    else pack_blocks<uint16_t, 2>(p, begin, end);
  });
}

void packed_linear(const PackedLinearParams& p) {
  if (p.rows > 0 && p.outputs > 0) SAIT_DISPATCH(packed_linear, p);
}

}  // namespace sait::cpu
#endif
