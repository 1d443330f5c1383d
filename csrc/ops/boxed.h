// A function as torch calls an op: with arguments and results in an array of 64-bit values. As TORCH_BOX, for our Tensor.
//
//   m.impl("gather_tokens", sait::boxed<sait::gather_tokens>);
//   m.impl("_check_gather_tokens", sait::boxed_checks<sait::check_gather_tokens>);  // runs it and drops what it returns
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops/tensor.h"

namespace sait {
namespace boxing {

// What holds an argument during the call, and how it is made. It owns what it is made of.
template <typename T>
struct Argument {
  using Type = T;
  static Type take(StableIValue value) { return torch::stable::detail::to<T>(value); }
};
template <>
struct Argument<std::string_view> {
  using Type = std::string;
  static Type take(StableIValue value) { return torch::stable::detail::to<std::string>(value); }
};
template <>
struct Argument<Tensor> {
  using Type = Tensor;
  static Type take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
};
template <>
struct Argument<OptionalTensor> {
  using Type = OptionalTensor;
  static Type take(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    return handle ? OptionalTensor(std::in_place, *handle) : std::nullopt;
  }
};

template <>
struct Argument<std::vector<Tensor>> {
  using Type = std::vector<Tensor>;
  static Type take(StableIValue value) {
    const auto handles = torch::stable::detail::to<std::vector<AtenTensorHandle>>(value);
    Type tensors;
    tensors.reserve(handles.size());
    for (const AtenTensorHandle handle : handles) tensors.emplace_back(handle);
    return tensors;
  }
};

template <typename T>
StableIValue give(T result) {
  if constexpr (std::is_same_v<T, Tensor>) {
    return torch::stable::detail::from(result.release());
  } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {
    std::vector<AtenTensorHandle> handles;
    for (Tensor& tensor : result) handles.push_back(tensor.release());
    return torch::stable::detail::from(handles);
  } else {
    return torch::stable::detail::from(std::move(result));
  }
}
template <typename T>
void give_all(StableIValue* stack, T result) {
  stack[0] = give(std::move(result));
}
template <typename... T>
void give_all(StableIValue* stack, std::tuple<T...> results) {
  std::apply([stack](T&... result) mutable { ((*stack++ = give(std::move(result))), ...); }, results);
}

template <auto function, bool gives>
struct Boxed;
template <typename Result, typename... Arguments, Result (*function)(Arguments...), bool gives>
struct Boxed<function, gives> {
  template <size_t... i>
  static void call(StableIValue* stack, std::index_sequence<i...>) {
    std::tuple<typename Argument<std::remove_cvref_t<Arguments>>::Type...> arguments{
        Argument<std::remove_cvref_t<Arguments>>::take(stack[i])...};
    if constexpr (gives) {
      give_all(stack, std::apply(function, arguments));
    } else {
      std::apply(function, arguments);
    }
  }
  static void call(StableIValue* stack, uint64_t count, uint64_t) {
    STD_TORCH_CHECK(count == sizeof...(Arguments), "the schema has ", count, " arguments, the function another number");
    call(stack, std::index_sequence_for<Arguments...>());
  }
};

}  // namespace boxing

template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  boxing::Boxed<function, true>::call(stack, arguments, results);
}

template <auto function>
void boxed_checks(StableIValue* stack, uint64_t arguments, uint64_t results) {
  boxing::Boxed<function, false>::call(stack, arguments, results);
}

}  // namespace sait
