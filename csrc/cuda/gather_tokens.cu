// out[i] = x[indices[i]]: one warp per row, 16 bytes a lane where the addresses allow, so that a row of 384 bf16 (768
// bytes) is one and a half instructions a lane. Reads kept rows only.
#include <cuda_runtime.h>

#include "sait/gather_tokens.h"

namespace sait::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

template <typename Word>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock) gather_rows(GatherTokensParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (row >= params.rows) return;
  const int64_t words = params.row_bytes / static_cast<int64_t>(sizeof(Word));
  const char* source = static_cast<const char*>(params.x) + params.indices[row] * params.x_row_stride;
  char* target = static_cast<char*>(params.out) + row * params.row_bytes;
  for (int64_t i = threadIdx.x; i < words; i += kWarp) {
    reinterpret_cast<Word*>(target)[i] = __ldg(reinterpret_cast<const Word*>(source) + i);
  }
}

template <typename Word>
bool fits(const GatherTokensParams& p) {
  return ((reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.out) | static_cast<uintptr_t>(p.row_bytes) |
           static_cast<uintptr_t>(p.x_row_stride)) %
          sizeof(Word)) == 0;
}

}  // namespace

int gather_tokens(const GatherTokensParams& params, void* stream) {
  if (params.rows == 0 || params.row_bytes == 0) return cudaSuccess;
  const dim3 block(kWarp, kWarpsPerBlock);
  const dim3 grid(static_cast<unsigned>((params.rows + kWarpsPerBlock - 1) / kWarpsPerBlock));
  const auto queue = static_cast<cudaStream_t>(stream);
  if (fits<uint4>(params)) {
    gather_rows<uint4><<<grid, block, 0, queue>>>(params);
  } else if (fits<unsigned>(params)) {
    gather_rows<unsigned><<<grid, block, 0, queue>>>(params);
  } else {
    gather_rows<unsigned short><<<grid, block, 0, queue>>>(params);  // every dtype served has at least 2 bytes
  }
  return cudaGetLastError();
}

}  // namespace sait::cuda
