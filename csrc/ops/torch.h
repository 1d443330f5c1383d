// All that the library sees of torch: its stable ABI, as of version 2.11, so that one library serves every torch since.
// torch.cpp has what that leaves out.
#pragma once

#include <optional>
#include <string>

#include "ops/boxed.h"
#include "ops/tensor.h"

namespace sait {

// Python's errors. std::invalid_argument is ValueError, std::runtime_error RuntimeError.
[[noreturn]] void raise_value_error(const std::string& message);
[[noreturn]] void raise_type_error(const std::string& message);

// Contiguous tensors on the device of `like`, of its type unless another is given.
Tensor allocate(const Tensor& like, Sizes sizes, std::optional<ScalarType> type = std::nullopt);
Tensor allocate_zeros(const Tensor& like, Sizes sizes, std::optional<ScalarType> type = std::nullopt);
inline Tensor allocate_like(const Tensor& like) { return allocate(like, like.sizes()); }
void poison_memory(bool on);  // what is allocated on the CPU from now on holds NaN, or -1 (tests)
int64_t poisoned_bytes();  // so far

void set_to_zero(const Tensor& t);

Tensor contiguous_copy(const Tensor& t, ScalarType type);

// The elements of a tensor, contiguous and of one type: its own where they are that, else those of a copy, which lives as
// long as this. Of nullptr: none.
class Contiguous {
 public:
  Contiguous(const Tensor* t, ScalarType type) {
    if (t == nullptr) return;
    if (t->scalar_type() != type || !t->is_contiguous()) t = &copy_.emplace(contiguous_copy(*t, type));
    data_ = t->const_data_ptr();
  }
  Contiguous(const Tensor& t, ScalarType type) : Contiguous(&t, type) {}

  template <typename T>
  const T* data() const {
    return static_cast<const T*>(data_);
  }

 private:
  OptionalTensor copy_;
  const void* data_ = nullptr;
};

// A tensor of the caller's, or nullptr.
inline const Tensor* or_null(const OptionalTensor& t) { return t ? &*t : nullptr; }

Tensor first(const Tensor& t, int64_t size);  // a view of the first rows
Tensor on_cpu(const Tensor& t);  // waits for the device

// The current stream of a CUDA device, as kernels take it.
void* current_cuda_stream(int32_t device);

}  // namespace sait
