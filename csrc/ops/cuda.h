// Which calls a CUDA kernel serves, and its launch on the current stream of a tensor's device. Only built with CUDA, or
// with SAIT_EMULATE, where the CUDA kernels run on the host, for tensors of the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "ops/common.h"
#include "sait/device.h"

namespace sait {

inline void check_launch(const char* op, int error) {
  if (error != 0) [[unlikely]]
    throw std::runtime_error(std::string(op) + ": the CUDA launch failed: " + cuda::error_text(error));
}

#ifdef SAIT_EMULATE

inline bool runs_on_cuda(const Tensor&) { return true; }

// run() with a tensor's device as the current one.
template <typename Run>
auto on_device_of(const char*, const Tensor&, Run run) {
  return run();
}

template <typename Launcher>
void launch(const char* op, const Tensor&, Launcher launcher) {
  check_launch(op, launcher(nullptr));
}

#else

inline bool runs_on_cuda(const Tensor& x) { return x.is_cuda(); }

// run() with a tensor's device as the current one, of torch and of the CUDA runtime in this library.
template <typename Run>
auto on_device_of(const char* op, const Tensor& x, Run run) {
  const torch::stable::accelerator::DeviceGuard guard(x.device_index());
  check_launch(op, cuda::use_device(x.device_index()));
  return run();
}

template <typename Launcher>
void launch(const char* op, const Tensor& on, Launcher launcher) {
  check_launch(op, on_device_of(op, on, [&] { return launcher(current_cuda_stream(on.device_index())); }));
}

#endif

// The tensor, or a copy of it if one of its rows does not start at a multiple of 16 bytes, as the kernels read them.
inline Tensor aligned(const Tensor& t) {
  int64_t bytes = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.const_data_ptr()));
  for (int64_t i = 0; i + 1 < t.dim(); ++i) bytes |= t.size(i) > 1 ? t.stride(i) * t.element_size() : 0;
  return bytes % 16 == 0 ? t : contiguous_copy(t, t.scalar_type());
}

}  // namespace sait
