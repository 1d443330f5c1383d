// The pybind11 module sait_kernels._C (sait_kernels._emulated in `make emulate`): build facts and CPU features. Importing it registers the torch ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <iterator>
#include <vector>

#include "cpu/runtime.h"
#include "sait/compact_attention.h"

#ifndef SAIT_CUDA_VERSION
#define SAIT_CUDA_VERSION ""
#endif
#ifndef SAIT_CUDA_ARCHS
#define SAIT_CUDA_ARCHS ""
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace sait::cpu;
  m.doc() = "Build facts and CPU features of sait_kernels; the ops are torch.ops.sait.*";
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("cuda_version") = SAIT_CUDA_VERSION;
  m.attr("cuda_archs") = SAIT_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_head_dims") = std::vector<int64_t>(std::begin(sait::cuda::kHeadDims), std::end(sait::cuda::kHeadDims));
  m.def("best_isa", [] { return isa_name(best_isa()); }, "The widest instruction set of this CPU that kernels use.");
  m.def("isa", [] { return isa_name(isa()); }, "The instruction set in force.");
  m.def("set_isa", [](const char* name) { set_isa(isa_from_name(name)); }, "Lowers the instruction set (tests).");
}
