// out[i] = x[indices[i]], and scattered back: one warp per row of the result, 16 bytes a lane where addresses allow, so
// that a row of 384 bf16 (768 bytes) is one and a half instructions a lane. Only rows that end in the result are read.
#include "sait/gather_tokens.h"

#include "launch.cuh"

namespace sait::cuda {
namespace {

constexpr int kWarps = 8;  // of a block

// The row of the result that this warp writes; it may lie behind the last.
SAIT_DEVICE int64_t warp_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; }

// Copies a row, or writes zeros where there is no source.
template <typename Word>
SAIT_DEVICE void write_row(char* target, const char* source, int64_t bytes) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(Word));
  Word* __restrict__ to = reinterpret_cast<Word*>(target);
  const Word* __restrict__ from = reinterpret_cast<const Word*>(source);
  const int lane = threadIdx.x % kWarpSize;
  if (source != nullptr) {
#pragma unroll 4
    for (int64_t i = lane; i < words; i += kWarpSize) to[i] = from[i];
  } else {
#pragma unroll 4
    for (int64_t i = lane; i < words; i += kWarpSize) to[i] = Word{};
  }
}

template <typename Word>
__global__ void __launch_bounds__(kWarps* kWarpSize) gather_rows(GatherTokensParams params) {
  const int64_t row = warp_row();
  if (row >= params.rows) return;
  const int32_t index = params.indices[row];
  const char* source = nullptr;  // no row
  if (index < params.total) source = static_cast<const char*>(params.x) + index * params.x_row_stride;
  write_row<Word>(static_cast<char*>(params.out) + row * params.row_bytes, source, params.row_bytes);
}

// How many of the ascending indices lie below `row`. The lanes look at 32 places at once: 3 rounds for 32768 indices,
// where bisection takes 15.
SAIT_DEVICE int64_t count_below(const int32_t* indices, int64_t rows, int64_t row) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t begin = 0, end = rows;
  while (begin < end) {
    const int64_t step = (end - begin + kWarpSize - 1) / kWarpSize, at = begin + lane * step;
    const int64_t below = reduce_add(at < end && indices[at] < row);
    if (below == 0) break;
    const int64_t behind = begin + below * step;
    begin = behind - step + 1;
    end = behind < end ? behind : end;
  }
  return begin;
}

template <typename Word>
__global__ void __launch_bounds__(kWarps* kWarpSize) scatter_rows(ScatterTokensParams params) {
  const int64_t row = warp_row();
  if (row >= params.total) return;
  const int64_t kept = count_below(params.indices, params.rows, row);
  const char* source = nullptr;
  if (kept < params.rows && params.indices[kept] == row) {
    source = static_cast<const char*>(params.y) + kept * params.y_row_stride;
  } else if (params.base != nullptr) {
    source = static_cast<const char*>(params.base) + row * params.base_row_stride;
  }
  write_row<Word>(static_cast<char*>(params.out) + row * params.row_bytes, source, params.row_bytes);
}

// All bits of the addresses and sizes that a word has to divide.
template <typename... Values>
uintptr_t bits_of(Values... values) {
  return (... | (uintptr_t)(values));
}

// kernels[0] moves 16 bytes a lane, kernels[1] four, kernels[2] two, which every dtype has.
template <typename Params>
int launch_rows(void (*const (&kernels)[3])(Params), uintptr_t bits, int64_t rows, void* stream, const Params& params) {
  if (params.row_bytes == 0) return cudaSuccess;
  const Grid grid{.x = (rows + kWarps - 1) / kWarps, .threads = kWarps * kWarpSize};
  return launch(kernels[bits % 16 == 0 ? 0 : bits % 4 == 0 ? 1 : 2], grid, stream, params);
}

}  // namespace

int gather_tokens(const GatherTokensParams& p, void* stream) {
  return launch_rows({gather_rows<uint4>, gather_rows<uint32_t>, gather_rows<uint16_t>},
                     bits_of(p.x, p.out, p.row_bytes, p.x_row_stride), p.rows, stream, p);
}

int scatter_tokens(const ScatterTokensParams& p, void* stream) {
  return launch_rows({scatter_rows<uint4>, scatter_rows<uint32_t>, scatter_rows<uint16_t>},
                     bits_of(p.y, p.base, p.out, p.row_bytes, p.y_row_stride, p.base_row_stride), p.total, stream, p);
}

}  // namespace sait::cuda
