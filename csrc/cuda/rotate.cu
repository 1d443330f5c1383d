// rotate: q and k in one launch. A thread has a few channels of a row and those that they turn with, in 16-byte accesses
// where the addresses allow: it reads their sines and cosines once and walks along the heads. With few rows, blocks
// share out the heads, so that there are threads enough to hide the memory's latency.
#include "sait/rotate.h"

#include <algorithm>

#include "head_view.cuh"
#include "launch.cuh"
#include "numbers.cuh"

namespace sait::cuda {
namespace {

constexpr int kThreads = 128;  // of a block
constexpr int64_t kWanted = 1 << 18;  // threads: as many as the 132 SMs of an H100 hold

// Two pieces of kWidth channels: halves of a head turn with each other, pairs lie side by side in one piece.
template <int kWidth>
struct Pieces {
  float numbers[2][kWidth];
};

// Channel j of those that turn, and its partner.
template <bool kPairs, int kWidth>
SAIT_DEVICE float& first_of(Pieces<kWidth>& pieces, int j) {
  return kPairs ? pieces.numbers[2 * j / kWidth][2 * j % kWidth] : pieces.numbers[0][j];
}
template <bool kPairs, int kWidth>
SAIT_DEVICE float& second_of(Pieces<kWidth>& pieces, int j) {
  return kPairs ? pieces.numbers[(2 * j + 1) / kWidth][(2 * j + 1) % kWidth] : pieces.numbers[1][j];
}

template <int kWidth, typename T>
SAIT_DEVICE void load_pieces(Pieces<kWidth>& pieces, const T* from, int64_t apart) {
  load(pieces.numbers[0], from);
  load(pieces.numbers[1], from + apart);
}

// As bits: NaN keeps its payload.
template <int kWidth, typename T>
SAIT_DEVICE void copy(T* to, const T* from) {
  if constexpr (kWidth == 1) *to = *from;
  else *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

template <typename T, bool kPairs, int kWidth>
__global__ void __launch_bounds__(kThreads) rotate_rows(const RotateParams p) {
  const int64_t pieces = p.head_dim / (2 * kWidth);  // of a row, each with its partners
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = thread / pieces, piece = thread % pieces;
  if (row >= p.rows) return;
  const int64_t first = piece * (kPairs ? 2 * kWidth : kWidth), apart = kPairs ? kWidth : p.head_dim / 2;
  const int64_t out = row * p.heads * p.head_dim + first;
  T *q_out = static_cast<T*>(p.q_out) + out, *k_out = static_cast<T*>(p.k_out) + out;
  const int32_t position = p.positions[row];
  const bool turns = position >= 0 && position < p.entries;
  const float* entry = p.table + (turns ? position : 0) * p.table_row_stride + first;

  Pieces<kWidth> w, cos;
  const auto load_entry = [&](int64_t head) {
    const float* from = entry + head * p.table_head_stride;
    load_pieces(w, from, apart);
    load_pieces(cos, from + p.head_dim, apart);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float &w1 = first_of<kPairs>(w, j), &w2 = second_of<kPairs>(w, j);  // still the sines
      const float sin1 = w1, sin2 = w2;
      w1 = p.transposed ? sin2 : -sin1, w2 = p.transposed ? -sin1 : sin2;
    }
  };
  const auto turn = [&](T* to, Pieces<kWidth>& x) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float &x1 = first_of<kPairs>(x, j), &x2 = second_of<kPairs>(x, j);
      const float out1 = fmaf(x1, first_of<kPairs>(cos, j), x2 * first_of<kPairs>(w, j));
      const float out2 = fmaf(x2, second_of<kPairs>(cos, j), x1 * second_of<kPairs>(w, j));
      x1 = out1, x2 = out2;
    }
    store(to, x.numbers[0]);
    store(to + apart, x.numbers[1]);
  };

  const bool shared = p.table_head_stride == 0;
  if (turns && shared) load_entry(0);
#pragma unroll 1
  for (int64_t head = blockIdx.y; head < p.heads; head += gridDim.y) {
    const T *q = row_of<T>(p.q, row, head) + first, *k = row_of<T>(p.k, row, head) + first;
    T *q_to = q_out + head * p.head_dim, *k_to = k_out + head * p.head_dim;
    if (!turns) {
      copy<kWidth>(q_to, q), copy<kWidth>(q_to + apart, q + apart);
      copy<kWidth>(k_to, k), copy<kWidth>(k_to + apart, k + apart);
      continue;
    }
    Pieces<kWidth> of_q, of_k;
    load_pieces(of_q, q, apart);
    load_pieces(of_k, k, apart);
    if (!shared) load_entry(head);
    turn(q_to, of_q);
    turn(k_to, of_k);
  }
}

template <typename T, bool kPairs, int kWidth>
int launch_width(const RotateParams& p, void* stream) {
  const int64_t blocks = (p.rows * (p.head_dim / (2 * kWidth)) + kThreads - 1) / kThreads;
  const int64_t parts = (kWanted / kThreads + blocks - 1) / std::max<int64_t>(1, blocks);
  const Grid grid{.x = blocks, .y = std::min<int64_t>({p.heads, parts, 65535}), .threads = kThreads};
  return launch(rotate_rows<T, kPairs, kWidth>, grid, stream, p);
}

template <typename T>
int launch_type(const RotateParams& p, void* stream) {
  constexpr int kWidth = 16 / sizeof(T);
  uintptr_t bits = 0;  // of all addresses: those of rows and heads, too
  for (const void* address : {p.q.data, p.k.data, static_cast<const void*>(p.table), static_cast<const void*>(p.q_out),
                              static_cast<const void*>(p.k_out)}) {
    bits |= reinterpret_cast<uintptr_t>(address);
  }
  for (const int64_t stride : {p.q.row_stride, p.q.head_stride, p.k.row_stride, p.k.head_stride}) {
    bits |= stride * sizeof(T);
  }
  for (const int64_t stride : {p.table_row_stride, p.table_head_stride}) bits |= stride * sizeof(float);
  if (bits % 16 == 0 && p.head_dim % (2 * kWidth) == 0) {
    return p.pairs ? launch_width<T, true, kWidth>(p, stream) : launch_width<T, false, kWidth>(p, stream);
  }
  return p.pairs ? launch_width<T, true, 1>(p, stream) : launch_width<T, false, 1>(p, stream);
}

}  // namespace

int rotate(const RotateParams& params, void* stream) {
  switch (params.dtype) {
    case DType::kFloat32: return launch_type<float>(params, stream);
    case DType::kBFloat16: return launch_type<__nv_bfloat16>(params, stream);
    default: return launch_type<__half>(params, stream);
  }
}

}  // namespace sait::cuda
