// Which calls a CUDA kernel serves, and its launch on the current stream of a tensor's device. Only built with CUDA, or
// with SAIT_EMULATE, where the CUDA kernels run on the host, for tensors of the CPU.
#pragma once

#ifndef SAIT_EMULATE
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <ATen/ops/clone.h>

#include "ops/common.h"

namespace sait {

#ifdef SAIT_EMULATE

inline bool runs_on_cuda(const at::Tensor&) { return true; }

template <typename Launcher>
void launch(const char* op, const at::Tensor&, Launcher launcher) {
  const int error = launcher(nullptr);
  TORCH_CHECK(error == 0, op, ": the emulated CUDA launch failed: error ", error);
}

#else

inline bool runs_on_cuda(const at::Tensor& x) { return x.is_cuda(); }

template <typename Launcher>
void launch(const char* op, const at::Tensor& on, Launcher launcher) {
  const c10::cuda::CUDAGuard guard(on.device());
  const int error = launcher(static_cast<void*>(c10::cuda::getCurrentCUDAStream().stream()));
  TORCH_CHECK(error == 0, op, ": the CUDA launch failed: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

#endif

// The tensor, or a copy of it if one of its rows does not start at a multiple of 16 bytes, as the kernels read them.
inline at::Tensor aligned(const at::Tensor& t) {
  int64_t bytes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
  for (int64_t i = 0; i + 1 < t.dim(); ++i) bytes |= t.size(i) > 1 ? t.stride(i) * t.element_size() : 0;
  return bytes % 16 == 0 ? t : t.clone(at::MemoryFormat::Contiguous);
}

}  // namespace sait
