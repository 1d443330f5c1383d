// A tensor of torch, by its stable C interface. torch::stable::Tensor is the same with a shared pointer around, and asks
// for each size anew: 0.5 to 1.5 us more for a call of an op here, which takes 2 to 5.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace sait {

using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

class Tensor {
 public:
  // Takes the handle over. Sizes, strides and type are read once: no op changes those of a tensor.
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &device_index_));
  }
  Tensor(const Tensor& other) : Tensor(shared(other.handle_)) {}
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle handle() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i < 0 ? i + dim_ : i]; }
  int64_t stride(int64_t i) const { return strides_[i < 0 ? i + dim_ : i]; }
  Sizes sizes() const { return Sizes(sizes_, static_cast<size_t>(dim_)); }
  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dim_; ++i) product *= sizes_[i];
    return product;
  }
  bool is_contiguous() const {
    bool is;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &is));
    return is;
  }

  int32_t dtype() const { return dtype_; }  // torch's own number of it
  ScalarType scalar_type() const;
  int64_t element_size() const { return static_cast<int64_t>(aoti_torch_dtype_element_size(dtype_)); }

  int32_t device_type() const { return device_type_; }  // torch's own number of it
  int32_t device_index() const { return device_index_; }
  bool is_cpu() const { return device_type_ == aoti_torch_device_type_cpu(); }
  bool is_cuda() const { return device_type_ == aoti_torch_device_type_cuda(); }
  std::string device() const;  // "cpu", "cuda:0"
  bool shares_device(const Tensor& other) const {
    return device_type_ == other.device_type_ && device_index_ == other.device_index_;
  }

  const void* const_data_ptr() const {
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }
  // Of a tensor whose type was checked.
  template <typename T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(const_data_ptr());
  }
  template <typename T>
  T* mutable_data_ptr() const {
    return static_cast<T*>(mutable_data_ptr());
  }

 private:
  static AtenTensorHandle shared(AtenTensorHandle handle) {
    AtenTensorHandle another;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &another));
    return another;
  }
  void swap(Tensor& other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(dim_, other.dim_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dtype_, other.dtype_);
    std::swap(device_type_, other.device_type_);
    std::swap(device_index_, other.device_index_);
  }

  AtenTensorHandle handle_ = nullptr;
  int64_t dim_ = 0;
  int64_t *sizes_ = nullptr, *strides_ = nullptr;
  int32_t dtype_ = 0, device_type_ = 0, device_index_ = 0;
};

using OptionalTensor = std::optional<Tensor>;

}  // namespace sait
