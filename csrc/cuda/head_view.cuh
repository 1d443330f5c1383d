// A head of one row in a (T, H, D) view.
#pragma once

#include "instructions.cuh"
#include "sait/types.h"

namespace sait::cuda {

template <typename Element>
SAIT_DEVICE const Element* row_of(const HeadView& view, int64_t row, int64_t head) {
  return static_cast<const Element*>(view.data) + row * view.row_stride + head * view.head_stride;
}

}  // namespace sait::cuda
