// The pybind11 module sait_kernels._C (sait_kernels._emulated in `make emulate`): build facts and CPU features. Importing it registers the torch ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "cpu/runtime.h"
#include "ops/torch.h"
#include "sait/compact_attention.h"
#include "sait/device.h"

#ifndef SAIT_CUDA_VERSION
#define SAIT_CUDA_VERSION ""
#endif
#ifndef SAIT_CUDA_ARCHS
#define SAIT_CUDA_ARCHS ""
#endif

namespace {

// Some words of each of several pieces of memory, which somebody else keeps alive: at most kWords of one, evenly spread,
// its first and last among them. An optimizer's step changes nearly every weight, so their hash tells that there was one
// whoever made it.
class Sample {
 public:
  explicit Sample(std::vector<std::pair<uintptr_t, int64_t>> pieces) : pieces_(std::move(pieces)) {}

  uint64_t hash() const {
    uint64_t hash = 0xcbf29ce484222325;
    for (const auto& [address, bytes] : pieces_) {
      const char* data = reinterpret_cast<const char*>(address);
      const int64_t words = bytes / kWordBytes, taken = std::min(words, kWords);
      for (int64_t i = 0; i < taken; ++i) {
        const int64_t word = taken == 1 ? 0 : i * (words - 1) / (taken - 1);
        uint64_t value;
        std::memcpy(&value, data + word * kWordBytes, kWordBytes);
        hash = mixed(hash, value);
      }
      uint64_t rest = 0;
      std::memcpy(&rest, data + words * kWordBytes, bytes - words * kWordBytes);
      hash = mixed(hash, rest);
    }
    return hash;
  }

 private:
  static constexpr int64_t kWords = 64, kWordBytes = 8;

  static uint64_t mixed(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9e3779b97f4a7c15;
    return hash ^ (hash >> 32);
  }

  std::vector<std::pair<uintptr_t, int64_t>> pieces_;
};

// "0.1.0 in /path/to/_C.so"
std::string library() {
  Dl_info info{};
  dladdr(reinterpret_cast<const void*>(&library), &info);
  return SAIT_VERSION " in " + std::string(info.dli_fname == nullptr ? "an unknown file" : info.dli_fname);
}

}  // namespace

// An op, for whoever would load another library into this process, which may not be able to import this one.
STABLE_TORCH_LIBRARY_FRAGMENT(sait, m) { m.def("_library() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(sait, CompositeExplicitAutograd, m) { m.impl("_library", sait::boxed<library>); }

PYBIND11_MODULE(SAIT_MODULE, m) {
  using namespace sait::cpu;
  m.doc() = "Build facts and CPU features of sait_kernels; the ops are torch.ops.sait.*";
  m.attr("version") = SAIT_VERSION;
  m.attr("cuda_version") = SAIT_CUDA_VERSION;
  m.attr("cuda_archs") = SAIT_CUDA_ARCHS;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_head_dims") = std::vector<int64_t>(std::begin(sait::cuda::kHeadDims), std::end(sait::cuda::kHeadDims));
  pybind11::class_<Sample>(m, "Sample", "Some words of pieces of memory: (address, bytes) each.")
      .def(pybind11::init<std::vector<std::pair<uintptr_t, int64_t>>>())
      .def("hash", &Sample::hash, "Of what lies there now.");
  m.def("poison_memory", sait::poison_memory, "Whether memory that ops allocate on the CPU holds NaN first (tests).");
  m.def("poisoned_bytes", sait::poisoned_bytes, "How many bytes did so far.");
  m.def("best_isa", [] { return isa_name(best_isa()); }, "The widest instruction set of this CPU that kernels use.");
  m.def("isa", [] { return isa_name(isa()); }, "The instruction set in force.");
#ifdef SAIT_WITH_CUDA
  m.def(
      "cuda_versions", [] { return std::pair(sait::cuda::runtime_version(), sait::cuda::driver_version()); },
      "The CUDA runtime in this library, and what the installed driver serves (0: there is none); 13000 is 13.0.");
#endif
  m.def("set_isa", [](const char* name) { set_isa(isa_from_name(name)); }, "Lowers the instruction set (tests).");
}
