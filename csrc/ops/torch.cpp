// What torch's stable ABI leaves out.
#include "ops/torch.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>

#include <atomic>
#include <cstring>
#include <stdexcept>

#include "cpu/runtime.h"

namespace sait {
namespace {

// Python's type is looked for when the error reaches Python, whose lock is held there.
class OutOfMemory : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override {
    PyErr_SetString(pybind11::module_::import("torch").attr("OutOfMemoryError").ptr(), what());
  }
};

// The ABI says only that an allocation failed; what torch had to say it has written to stderr.
[[noreturn]] void raise_out_of_memory(int32_t device_type, Sizes sizes) {
  std::string shape;
  for (const int64_t size : sizes) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  const std::string message = "sait_kernels: torch has no memory for a tensor of (" + shape + "); more is on stderr";
  if (device_type == aoti_torch_device_type_cuda()) throw OutOfMemory(message);
  throw std::runtime_error(message);
}

}  // namespace

void raise_value_error(const std::string& message) { throw std::invalid_argument(message); }
void raise_type_error(const std::string& message) { throw pybind11::type_error(message); }

ScalarType Tensor::scalar_type() const {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  static const int32_t float16 = aoti_torch_dtype_float16(), int32 = aoti_torch_dtype_int32();
  if (dtype_ == float32) return ScalarType::Float;
  if (dtype_ == bfloat16) return ScalarType::BFloat16;
  if (dtype_ == float16) return ScalarType::Half;
  if (dtype_ == int32) return ScalarType::Int;
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_));  // asks for every type in turn
}

std::string Tensor::device() const {
  const std::string index = device_index_ < 0 ? "" : ":" + std::to_string(device_index_);
  if (is_cpu()) return "cpu" + index;
  if (is_cuda()) return "cuda" + index;
  if (device_type_ == aoti_torch_device_type_meta()) return "meta" + index;
  if (device_type_ == aoti_torch_device_type_xpu()) return "xpu" + index;
  if (device_type_ == aoti_torch_device_type_mps()) return "mps" + index;
  return "device of type " + std::to_string(device_type_) + index;
}

static std::atomic<bool> poisoned{false};
static std::atomic<int64_t> bytes_poisoned{0};
void poison_memory(bool on) { poisoned.store(on, std::memory_order_relaxed); }
int64_t poisoned_bytes() { return bytes_poisoned.load(std::memory_order_relaxed); }

static Tensor allocate_on(int32_t device_type, int32_t device_index, Sizes sizes, int32_t dtype) {
  constexpr size_t kMostDimensions = 4;
  int64_t strides[kMostDimensions], elements = 1;
  if (sizes.size() > kMostDimensions) throw std::logic_error("sait_kernels: a tensor of too many dimensions");
  for (size_t i = sizes.size(); i-- > 0; elements *= sizes[i]) strides[i] = elements;
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype, device_type,
                               device_index, &handle) != TORCH_SUCCESS) {
    raise_out_of_memory(device_type, sizes);
  }
  Tensor made(handle);
  if (poisoned.load(std::memory_order_relaxed) && made.is_cpu() && elements > 0) {
    const int64_t bytes = elements * made.element_size();
    std::memset(made.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
    bytes_poisoned.fetch_add(bytes, std::memory_order_relaxed);
  }
  return made;
}

Tensor allocate(const Tensor& like, Sizes sizes, std::optional<ScalarType> type) {
  const int32_t dtype = type ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type)) : like.dtype();
  return allocate_on(like.device_type(), like.device_index(), sizes, dtype);
}

Tensor allocate_zeros(const Tensor& like, Sizes sizes, std::optional<ScalarType> type) {
  Tensor made = allocate(like, sizes, type);
  set_to_zero(made);
  return made;
}

void set_to_zero(const Tensor& t) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.handle())); }

Tensor contiguous_copy(const Tensor& t, ScalarType type) {
  Tensor made = allocate(t, t.sizes(), type);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(made.handle(), t.handle(), 0));
  return made;
}

Tensor first(const Tensor& t, int64_t size) {
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_narrow(t.handle(), 0, 0, size, &view));
  return Tensor(view);
}

Tensor on_cpu(const Tensor& t) {
  Tensor made = allocate_on(aoti_torch_device_type_cpu(), -1, t.sizes(), t.dtype());
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(made.handle(), t.handle(), 0));
  return made;
}

// Asked of torch's own library by name: a torch without CUDA has none, and this library is the same there.
void* current_cuda_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t device, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  if (get == nullptr) throw std::runtime_error("sait_kernels: this torch has no CUDA");
  void* stream;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

namespace cpu {

int num_threads() {
  if (Alone::is()) return 1;
  uint32_t threads;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return static_cast<int>(threads);
}

void parallel_ranges(int64_t size, int64_t grain, void* context, RangeFn fn) {
  if (Alone::is()) {
    if (size > 0) fn(0, size, context);
    return;
  }
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, size, grain, fn, context));
}

}  // namespace cpu
}  // namespace sait
