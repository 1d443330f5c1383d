// The tail of a packed batch: the rows behind its last image, which belong to none and whose results are zero.
#pragma once

#include "instructions.cuh"

namespace sait::cuda {

// Zeros words [begin, end), shared out among all blocks of a launch. Without a tail this is a comparison; a launch of its
// own, or zeros from the start, would cost every batch.
template <typename Word>
SAIT_DEVICE void zero_tail(Word* words, int64_t begin, int64_t end) {
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * blockDim.x;
  for (int64_t i = begin + block * blockDim.x + threadIdx.x; i < end; i += threads) words[i] = Word{};
}

}  // namespace sait::cuda
