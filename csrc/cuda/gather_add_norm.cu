// residual = x[indices] + gamma y and its LayerNorm: one warp per kept row. A row is read once and stays in registers up
// to 1536 channels; a longer one is read back from where it was just written, by the lanes that wrote it.
#include "sait/gather_add_norm.h"

#include "launch.cuh"
#include "numbers.cuh"

namespace sait::cuda {
namespace {

constexpr int kWarps = 8;  // of a block

using Params = GatherAddNormParamsOf<void>;

SAIT_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// A lane takes kWidth numbers at a time. kRounds of that hold a row in registers; 0: it is read back. The vectors are of
// type V, and widened here: a conversion of each would be a launch of its own.
template <typename T, typename V, int kWidth, int kRounds>
__global__ void __launch_bounds__(kWarps* kWarpSize) add_norm(const Params p) {
  constexpr bool kHolds = kRounds > 0;
  constexpr int kStep = kWidth * kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;
  const int32_t index = p.indices[row];
  const bool kept = index < p.total;  // else no row of x: zeros
  const T* x = static_cast<const T*>(p.x.data) + (kept ? index * p.x.row_stride : 0);
  const T* y = static_cast<const T*>(p.y.data) + row * p.y.row_stride;
  T* residual = static_cast<T*>(p.residual) + row * p.channels;
  T* normed = static_cast<T*>(p.normed) + row * p.channels;
  const V *weights = static_cast<const V*>(p.weight), *biases = static_cast<const V*>(p.bias),
          *gammas = static_cast<const V*>(p.gamma);
  const int64_t first = threadIdx.x % kWarpSize * kWidth;

  // body(i, held) for each piece of the row, from channel i on. `held` are the registers that keep it between passes;
  // if the row is not held, all pieces share one buffer, and each pass loads them anew.
  float held[kHolds ? kRounds : 1][kWidth];
  const auto for_each_piece = [&](auto body) {
    if constexpr (kHolds) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int64_t i = first + round * kStep;
        if (i < p.channels) body(i, held[round]);
      }
    } else {
#pragma unroll 1
      for (int64_t i = first; i < p.channels; i += kStep) body(i, held[0]);
    }
  };

  // The statistics are those of the residual as stored.
  float sum = 0;
  for_each_piece([&](int64_t i, float (&numbers)[kWidth]) {
    float branch[kWidth], scale[kWidth];
    if (kept) {
      load(numbers, x + i);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) numbers[j] = 0;
    }
    load(branch, y + i);
    if (gammas != nullptr) load(scale, gammas + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) numbers[j] += gammas != nullptr ? scale[j] * branch[j] : branch[j];
    store(residual + i, numbers);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += numbers[j];
  });
  const float count = static_cast<float>(p.channels), mean = warp_sum(sum) / count;

  // A second pass: E[r^2] - E[r]^2 would cancel where the mean is large.
  float squares = 0;
  for_each_piece([&](int64_t i, float (&numbers)[kWidth]) {
    if constexpr (!kHolds) load(numbers, residual + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) squares += (numbers[j] - mean) * (numbers[j] - mean);
  });
  const float rstd = 1.f / sqrtf(warp_sum(squares) / count + p.eps);

  for_each_piece([&](int64_t i, float (&numbers)[kWidth]) {
    float weight[kWidth], bias[kWidth], result[kWidth];
    if constexpr (!kHolds) load(numbers, residual + i);
    load(weight, weights + i);
    load(bias, biases + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) result[j] = fmaf((numbers[j] - mean) * rstd, weight[j], bias[j]);
    store(normed + i, result);
  });
}

template <typename T, typename V, int kWidth>
int launch_rows(const Params& p, void* stream) {
  constexpr int kStep = kWidth * kWarpSize;
  const Grid grid{.x = (p.rows + kWarps - 1) / kWarps, .threads = kWarps * kWarpSize};
  const auto kernel = p.channels <= 512    ? add_norm<T, V, kWidth, 512 / kStep>
                      : p.channels <= 1536 ? add_norm<T, V, kWidth, 1536 / kStep>
                                           : add_norm<T, V, kWidth, 0>;
  return launch(kernel, grid, stream, p);
}

template <typename T, typename V>
int launch_types(const Params& p, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  uintptr_t bits = 0;  // of all addresses: those of rows, too
  for (const void* address : {p.x.data, p.y.data, p.weight, p.bias, p.gamma, static_cast<const void*>(p.residual),
                              static_cast<const void*>(p.normed)}) {
    bits |= reinterpret_cast<uintptr_t>(address);
  }
  for (const int64_t stride : {p.x.row_stride, p.y.row_stride, p.channels}) bits |= stride * sizeof(T);
  return bits % 16 == 0 ? launch_rows<T, V, kWidth>(p, stream) : launch_rows<T, V, 1>(p, stream);
}

template <typename T>
int launch_type(const Params& p, DType vectors, void* stream) {
  return vectors == p.dtype ? launch_types<T, T>(p, stream) : launch_types<T, float>(p, stream);
}

}  // namespace

int gather_add_norm(const GatherAddNormParamsOf<void>& params, DType vectors, void* stream) {
  switch (params.dtype) {
    case DType::kFloat32: return launch_type<float>(params, vectors, stream);
    case DType::kBFloat16: return launch_type<__nv_bfloat16>(params, vectors, stream);
    default: return launch_type<__half>(params, vectors, stream);
  }
}

}  // namespace sait::cuda
