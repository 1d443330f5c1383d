// Launching a kernel: what is asked of the driver, and of the emulation in its place.
#pragma once

#include "instructions.cuh"

#ifdef SAIT_EMULATE
#include "launch.h"
#else

namespace sait::cuda {

struct Grid {
  int64_t x, y = 1;    // blocks; y <= 65535
  int threads;         // of a block
  int shared_bytes = 0;
  int cluster = 1;     // blocks along x that share their memory; above 8 only where the device allows it
};

// Major compute capability times ten plus minor of the current device; 0 on an error.
inline int capability() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

// The most dynamic shared memory that a block may ask for on the current device.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Runs kernel(params) on a stream (a cudaStream_t); returns a cudaError_t as int.
template <typename Params>
int launch(void (*kernel)(Params), const Grid& grid, void* stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  const auto function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
  }
  if (error == cudaSuccess && grid.cluster > 8) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, params);
  return error == cudaSuccess ? cudaGetLastError() : error;
}

}  // namespace sait::cuda
#endif
