#include "sait/device.h"

#include "launch.cuh"

#ifndef SAIT_CUDA_ARCHS  // in `make emulate`
#define SAIT_CUDA_ARCHS "the host"
#define CUDART_VERSION 13000
#endif

namespace sait::cuda {

int use_device(int32_t device) { return driver::cleared(cudaSetDevice(device)); }

std::string error_text(int error) {
  const std::string text = cudaGetErrorString(static_cast<cudaError_t>(error));
  driver::Device device;
  if (error != cudaErrorNoKernelImageForDevice || driver::current_device(device) != cudaSuccess) return text;
  return text + ": compute capability " + std::to_string(device.capability / 10) + "." +
         std::to_string(device.capability % 10) +
         ", and the library was built for " SAIT_CUDA_ARCHS
         ". Use `with sait_kernels.backend(\"triton\")`, or build it for this GPU, as TORCH_CUDA_ARCH_LIST names it";
}

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return driver::cleared(cudaDriverGetVersion(&version)) == cudaSuccess ? version : 0;
}

}  // namespace sait::cuda
