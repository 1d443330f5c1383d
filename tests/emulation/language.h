// What CUDA adds to C++ as far as csrc/cuda uses it: qualifiers, built-in variables, vector types, 16-bit floats, errors.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

// For what runs at every switch and in every product: the sanitizers watch the kernels, not the emulation. Such a
// function calls none of the standard library, whose templates are compiled with checks and then not inlined.
#define SAIT_UNCHECKED __attribute__((no_sanitize("address", "undefined"), optimize("O3")))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Those of the thread that runs; set at every switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::max;
using std::min;
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

// Without arithmetic and conversions, as torch's flags for nvcc have it.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

// Rounded to nearest, ties to even; a NaN becomes 0x7fff, as on the device.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto wide = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>(x != x ? 0x7fff : (wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}
inline __half __float2half_rn(float x) {
  const auto wide = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = wide & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  uint32_t narrow;
  if (magnitude >= 0x47800000) {  // 2^16
    narrow = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 the numbers of __half are 2^-24 apart, as those of float are at 1/2: the addition rounds.
    narrow = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    narrow = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  return {static_cast<uint16_t>((wide >> 16 & 0x8000) | narrow)};
}
SAIT_UNCHECKED inline float __bfloat162float(__nv_bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
SAIT_UNCHECKED inline float __half2float(__half x) {
  uint32_t wide = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, (x.bits & 0x7fffu) << 13) * 0x1p112f);
  if ((x.bits & 0x7c00) == 0x7c00) wide |= 0x7f800000;  // infinite or NaN
  return __builtin_bit_cast(float, wide | (x.bits & 0x8000u) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __half __float2half(float x) { return __float2half_rn(x); }

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidClusterSize = 912
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    default: return "cluster not launchable on this device";
  }
}
inline cudaError_t cudaMemsetAsync(void* target, int byte, size_t bytes, cudaStream_t) {
  std::memset(target, byte, bytes);
  return cudaSuccess;
}
