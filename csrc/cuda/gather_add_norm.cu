// residual = x[indices] + gamma y and its LayerNorm: one warp per kept row. A row is read once and stays in registers up
// to 1536 channels; a longer one is read back from where it was just written, by the lanes that wrote it.
#include "sait/gather_add_norm.h"

#include "launch.cuh"

namespace sait::cuda {
namespace {

constexpr int kWarps = 8;  // of a block

using Params = GatherAddNormParamsOf<void>;

SAIT_DEVICE float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
SAIT_DEVICE float widened(__half x) { return __half2float(x); }
SAIT_DEVICE void round_to(__nv_bfloat16& result, float x) { result = __float2bfloat16_rn(x); }
SAIT_DEVICE void round_to(__half& result, float x) { result = __float2half_rn(x); }

// kWidth numbers from an address that 16 bytes divide, or a single one.
template <int kWidth>
SAIT_DEVICE void load(float (&values)[kWidth], const float* from) {
  if constexpr (kWidth == 1) {
    values[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }
}
template <int kWidth, typename T>
SAIT_DEVICE void load(float (&values)[kWidth], const T* from) {
  if constexpr (kWidth == 1) {
    values[0] = widened(*from);
  } else {
    static_assert(kWidth == 8);
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    const float2 pairs[] = {unpack(words.x, T()), unpack(words.y, T()), unpack(words.z, T()), unpack(words.w, T())};
#pragma unroll
    for (int i = 0; i < 4; ++i) values[2 * i] = pairs[i].x, values[2 * i + 1] = pairs[i].y;
  }
}

// Writes them rounded, and leaves them as they were written.
template <int kWidth>
SAIT_DEVICE void store(float* to, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    *to = values[0];
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  }
}
template <int kWidth, typename T>
SAIT_DEVICE void store(T* to, float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    T rounded;
    round_to(rounded, values[0]);
    *to = rounded;
    values[0] = widened(rounded);
  } else {
    uint32_t words[kWidth / 2];
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      words[i] = pack(values[2 * i], values[2 * i + 1], T());
      const float2 pair = unpack(words[i], T());
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

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

  // body(i, held) for each piece of the row from channel i on; `held` are its registers, or room for it.
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
