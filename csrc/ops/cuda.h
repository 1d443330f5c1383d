// Runs a torch-free CUDA launcher on the current stream of a tensor's device. Only built with CUDA.
#pragma once

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/common.h"

namespace sait {

template <typename Launcher>
void launch(const char* op, const at::Tensor& on, Launcher launcher) {
  const c10::cuda::CUDAGuard guard(on.device());
  const int error = launcher(static_cast<void*>(c10::cuda::getCurrentCUDAStream().stream()));
  TORCH_CHECK(error == 0, op, ": the CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace sait
