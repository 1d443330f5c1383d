// packed_linear, packed_block and packed_embed on the CPU: a block of rows is normalised once, stays in the cache, and
// meets one block of columns of the weight after the other. What follows the GEMM is done on its float tile, before the
// result is rounded and written once. packed_block does the same for its three layers in turn; it takes many rows in
// blocks whose hidden rows stay in L2. packed_embed gathers its rows from images.
//
// bfloat16 uses bfloat16 GEMMs where the machine has instructions for them; everything else computes in float32.
#define SAIT_KERNEL_FILE "cpu/packed_linear.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/activation.h"
#include "cpu/rows.h"
#include "cpu/gemm.h"
#include "sait/packed_embed.h"
#include "sait/packed_linear.h"

namespace sait::cpu::SAIT_ISA {
namespace linear {

// Rows that a thread takes at a time: many, for the weight comes from further away and serves all of them, but they and
// a part of a block of columns fit in 1 MiB of L2. 102 is a multiple of a tile's 6 rows.
constexpr int64_t kMaxBlock = 102;
constexpr int64_t kBlockBytes = 832 * 1024;

// The type in which the GEMM of rows of type E computes.
#if defined(SAIT_VEC_AVX512_BF16)
template <typename E>
using GemmType = std::conditional_t<std::is_same_v<E, BF16>, BF16, F32>;
#else
template <typename E>
using GemmType = F32;
#endif

// The value that a row of type E would hold.
template <typename E>
inline Vec rounded(Vec a) {
  if constexpr (std::is_same_v<E, F32>) return a;
  else return widen(narrow(a, E::dtype), E::dtype);
}

// Where a GEMM reads its rows, and how far apart they are.
template <typename P>
struct Rows {
  const typename P::type* data;
  int64_t stride;
};

// All rows as type P, normalised where that is asked for, with zeros in columns from `inputs` up to `depth`.
template <typename E, typename P>
Rows<P> load_rows(const PackedLinearParams& p, int64_t depth) {
  using T = typename E::type;
  const T* x = static_cast<const T*>(p.x.data);
  if constexpr (std::is_same_v<E, P>) {
    if (p.norm_weight == nullptr && p.inputs == depth) return {x, p.x.row_stride};
  }
  auto* block = scratch<typename P::type, 0>(kMaxBlock * depth);
  for (int64_t i = 0; i < p.rows; ++i) {
    const T* row = x + i * p.x.row_stride;
    auto* out = block + i * depth;
    if (p.norm_weight == nullptr) {
      for_each_vec(p.inputs, [=](int64_t k, int n) { store_lanes<P>(out + k, load_lanes<E>(row + k, n), n); });
    } else {
      const float sum = sum_over(p.inputs, [=](int64_t k, int n) { return load_lanes<E>(row + k, n); });
      const Moments m = moments<E>(row, sum, p.inputs, p.eps);
      for_each_vec(p.inputs, [=, &p](int64_t k, int n) {
        const Vec standard = (load_lanes<E>(row + k, n) - set(m.mean)) * set(m.rstd);
        const Vec normed = fma(standard, load_lanes<F32>(p.norm_weight + k, n), load_lanes<F32>(p.norm_bias + k, n));
        store_lanes<P>(out + k, rounded<E>(normed), n);
      });
    }
    std::fill(out + p.inputs, out + depth, 0);
  }
  return {block, depth};
}

// A block of columns as type P: (depth, kPackedColumns), in pairs of inputs where P has two bytes.
template <typename E, typename P>
const typename P::type* load_columns(const PackedLinearParams& p, int64_t block, int64_t depth) {
  const auto* packed = static_cast<const typename E::type*>(p.packed) + block * depth * kPackedColumns;
  if constexpr (std::is_same_v<E, P>) {
    return packed;
  } else {
    float* columns = scratch<float, 1>(depth * kPackedColumns);
    float pairs[2 * kPackedColumns];
    for (int64_t k = 0; k < depth; k += 2) {
      float* out = columns + k * kPackedColumns;
      const auto* in = packed + k * kPackedColumns;
      for (int64_t i = 0; i < 2 * kPackedColumns; i += kWidth) store(pairs + i, load_as<E>(in + i));
      for (int64_t n = 0; n < kPackedColumns; ++n) {
        out[n] = pairs[2 * n];
        out[kPackedColumns + n] = pairs[2 * n + 1];
      }
    }
    return columns;
  }
}

// What is added to row t, from `column` on; nullptr for nothing.
template <typename E>
inline const typename E::type* residual_of(const PackedLinearParams& p, int64_t t, int64_t column) {
  const int64_t row = p.indices == nullptr ? t : p.indices[t];
  if (p.residual.data == nullptr || row >= p.total) return nullptr;
  return static_cast<const typename E::type*>(p.residual.data) + row * p.residual.row_stride + column;
}

// Prefetches a tile's part of the residual and of the result before its GEMM: rows of 128 bytes that lie far apart
// escape the hardware's prefetcher. When the GEMM is done they are in the cache.
template <typename E>
inline void prefetch_tile(const PackedLinearParams& p, int64_t first, int64_t rows, int64_t column) {
  using T = typename E::type;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t columns = std::min(packed_outputs(p.gated), p.outputs - column);
  for (int64_t t = first; t < first + rows; ++t) {
    const T* residual = residual_of<E>(p, t, column);
    const T* out = static_cast<const T*>(p.out) + t * p.outputs + column;
    for (int64_t i = 0; i < columns; i += kLine) {
      if (residual != nullptr) __builtin_prefetch(residual + i, 0);
      __builtin_prefetch(out + i, 1);
    }
  }
}

// Bias, activation, gate, gamma and residual of a tile of rows from `first` and outputs from `column` on.
template <typename E, Activation kActivation, bool kGated>
void finish(const PackedLinearParams& p, int64_t first, int64_t rows, int64_t column, const float* tile) {
  using T = typename E::type;
  constexpr bool kBFloat16 = std::is_same_v<E, BF16>;
  const auto from_column = [=](const float* vector) { return vector == nullptr ? nullptr : vector + column; };
  const float *bias = from_column(p.bias), *gate_bias = from_column(p.gate_bias), *gamma = from_column(p.gamma);
  constexpr int64_t kOutputs = packed_outputs(kGated);
  const int64_t columns = std::min(kOutputs, p.outputs - column);
  for (int64_t t = first; t < first + rows; ++t, tile += kPackedColumns) {
    const T* residual = residual_of<E>(p, t, column);
    T* out = static_cast<T*>(p.out) + t * p.outputs + column;
    for_each_vec(columns, [=](int64_t i, int n) {
      Vec value = load(tile + (kGated ? kOutputs : 0) + i);  // with a gate the tile holds its columns first
      if (bias != nullptr) value = value + load_lanes<F32>(bias + i, n);
      if constexpr (kGated) {
        Vec gate = load(tile + i);
        if (gate_bias != nullptr) gate = gate + load_lanes<F32>(gate_bias + i, n);
        value = activate<kActivation, kBFloat16>(gate) * value;
      } else {
        value = activate<kActivation, kBFloat16>(value);
      }
      if (gamma != nullptr) value = value * load_lanes<F32>(gamma + i, n);
      if (residual != nullptr) value = value + load_lanes<E>(residual + i, n);
      store_lanes<E>(out + i, value, n);
    });
  }
}

// finish() of a layer, chosen once for all its tiles.
template <typename E>
auto finish_of(const PackedLinearParams& p) {
  return visit_activation(p.activation, [&](auto activation) {
    return p.gated ? finish<E, activation, true> : finish<E, activation, false>;
  });
}

// All rows, at most kMaxBlock, of the result's blocks of columns [first, last). Where a sum is taken in parts, all rows
// take one part, which stays in the cache, after the other.
template <typename E>
void multiply(const PackedLinearParams& p, int64_t first, int64_t last) {
  using P = GemmType<E>;
  constexpr int64_t N = kPackedColumns, kInputs = Step<P>::kInputs;
  const int64_t outputs = packed_outputs(p.gated);
  const auto finish_tile = finish_of<E>(p);
  const int64_t depth = packed_depth(p.inputs, p.dtype), parts = parts_of_sum<P>(depth);
  const Rows<P> rows = load_rows<E, P>(p, depth);
  const int64_t tile_rows = (p.rows + kTileRows - 1) / kTileRows;
  float* tiles = scratch<float, 3>(kMaxBlock * N);
  for (int64_t b = first; b < last; ++b) {
    const auto* columns = load_columns<E, P>(p, b, depth);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t from = depth * part / parts, to = depth * (part + 1) / parts;
      const auto* next = static_cast<const typename E::type*>(p.packed) + (b * depth + to) * N;
      const bool more = part + 1 < parts || b + 1 < last;
      for (int64_t i = 0; i < p.rows; i += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, p.rows - i);
        float* tile = tiles + (parts == 1 ? 0 : i * N);
        if (part == parts - 1) prefetch_tile<E>(p, i, count, b * outputs);
        const int64_t steps = (to - from) / kInputs, bytes = (to - from) * N * static_cast<int64_t>(sizeof(*next));
        const Ahead ahead = more ? Ahead::share_of(next, bytes, i / kTileRows, tile_rows, steps) : Ahead{};
        const auto* A = rows.data + i * rows.stride + from;
        for (int64_t j = 0; j < N; j += kTileVecs * kWidth) {  // whole tiles only
          column_of_tiles<P, kTileVecs, false>(count, steps, A, rows.stride, columns + from * N + j * kInputs,
                                               N * kInputs, tile + j, N, part > 0, 0, ahead);
        }
        if (part == parts - 1) finish_tile(p, i, count, b * outputs, tile);
      }
    }
  }
}

// The same for some of the rows.
template <typename E>
PackedLinearParams some_rows(PackedLinearParams p, int64_t first, int64_t rows) {
  using T = typename E::type;
  p.x.data = static_cast<const T*>(p.x.data) + first * p.x.row_stride;
  if (p.indices != nullptr) {
    p.indices += first;
  } else if (p.residual.data != nullptr) {
    p.residual.data = static_cast<const T*>(p.residual.data) + first * p.residual.row_stride;
    p.total -= first;
  }
  p.out = static_cast<T*>(p.out) + first * p.outputs;
  p.rows = rows;
  return p;
}

// Blocks of rows of equal size, and as many for each thread: all have equal work.
struct Blocks {
  int64_t rows, size, count;

  Blocks(int64_t rows, int64_t row_bytes, int64_t threads) : rows(rows) {
    const int64_t most = std::clamp<int64_t>(kBlockBytes / row_bytes, kTileRows, kMaxBlock);
    const int64_t useful = std::clamp<int64_t>(rows / (2 * kTileRows), 1, threads);
    const int64_t wanted = round_up((rows + most - 1) / most, useful);
    size = (rows + wanted - 1) / wanted;
    count = (rows + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t rows_of(int64_t block) const { return std::min(size, rows - block * size); }
};

// Few rows are shared out by columns: a weight that comes from memory then goes to one thread, not to all.
inline bool goes_by_columns(int64_t rows, int64_t blocks) {
  return rows <= num_threads() * kMaxBlock && blocks % num_threads() == 0;
}

inline int64_t blocks_of(const PackedLinearParams& p) { return packed_blocks(p.outputs, p.gated); }

// An element is one sum in one order, so no bit of it depends on who computes it.
template <typename E>
void packed_linear(const PackedLinearParams& p) {
  const int64_t columns = blocks_of(p), threads = num_threads();
  const bool by_columns = goes_by_columns(p.rows, columns);
  const Blocks blocks(p.rows, p.inputs * sizeof(typename GemmType<E>::type), by_columns ? 1 : threads);
  const int64_t groups = by_columns ? threads : std::clamp<int64_t>(threads / blocks.count, 1, columns);
  parallel_for(groups * blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks.count, block = task % blocks.count;
      multiply<E>(some_rows<E>(p, blocks.first(block), blocks.rows_of(block)), columns * group / groups,
                  columns * (group + 1) / groups);
    }
  });
}

// The layers of some rows, whose hidden rows are at `hidden`.
template <typename E>
struct Layers {
  PackedLinearParams proj, fc1, fc2;

  Layers(const PackedBlockParams& p, int64_t first, int64_t rows, void* hidden)
      : proj(some_rows<E>(p.proj, first, rows)), fc1(p.fc1), fc2(p.fc2) {
    fc1.rows = fc2.rows = rows;
    fc1.x = fc2.residual = {proj.out, proj.outputs};
    fc1.out = hidden;
    fc2.x = {hidden, fc1.outputs};
    fc2.out = proj.out;  // each element is read before it is written
    fc2.total = rows;
  }
};

template <typename E>
void packed_block(const PackedBlockParams& p) {
  using T = typename E::type;
  const int64_t rows = p.proj.rows, channels = p.fc1.inputs, hidden = p.fc1.outputs;
  if (goes_by_columns(rows, blocks_of(p.proj)) && goes_by_columns(rows, blocks_of(p.fc1))) {
    const Layers<E> layers(p, 0, rows, scratch<T, 2>(rows * hidden));
    for (const PackedLinearParams* layer : {&layers.proj, &layers.fc1, &layers.fc2}) packed_linear<E>(*layer);
    return;
  }
  const int64_t normed = p.fc2.norm_weight == nullptr ? 0 : hidden;  // lies beside the hidden rows
  const Blocks blocks(rows, (channels + hidden + normed) * sizeof(typename GemmType<E>::type), num_threads());
  parallel_for(blocks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const Layers<E> layers(p, blocks.first(block), blocks.rows_of(block), scratch<T, 2>(kMaxBlock * hidden));
      for (const PackedLinearParams* layer : {&layers.proj, &layers.fc1, &layers.fc2}) {
        multiply<E>(*layer, 0, blocks_of(*layer));
      }
    }
  });
}

// Copies at least 16 bytes: 16 at a time, the last of them perhaps once more.
inline void copy_long(char* to, const char* from, int64_t bytes) {
  for (int64_t i = 0; i + 16 < bytes; i += 16) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + bytes - 16, from + bytes - 16, 16);
}

// Some patches of an image, as rows: (rows, inputs).
template <typename T>
void gather_patches(const PackedEmbedParams& p, const T* image, int64_t first, int64_t rows, T* out) {
  const int64_t height = p.patch_height, width = p.patch_width, bytes = width * static_cast<int64_t>(sizeof(T));
  for (int64_t patch = first; patch < first + rows; ++patch) {
    const T* corner = image + patch / p.columns * height * p.row_stride + patch % p.columns * width;
    for (int64_t c = 0; c < p.channels; ++c, corner += p.channel_stride) {
      for (int64_t y = 0; y < height; ++y, out += width) {
        const T* pixels = corner + y * p.row_stride;
        if (bytes >= 16) copy_long(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(pixels), bytes);
        else std::copy_n(pixels, width, out);
      }
    }
  }
}

// Gathers the patches of an image into a buffer that stays in the cache for their GEMM, which writes rows of the batch.
template <typename E>
void packed_embed(const PackedEmbedParams& p) {
  using T = typename E::type;
  const PackedLinearParams& patches = p.linear;
  const int64_t outputs = patches.outputs, row_bytes = patches.inputs * sizeof(typename GemmType<E>::type);
  const Blocks blocks(patches.rows, row_bytes, p.count < num_threads() ? num_threads() : 1);
  parallel_tasks(p.count * blocks.count, [&](int64_t task) {
    const int64_t image = task / blocks.count, block = task % blocks.count;
    const int64_t first = blocks.first(block), rows = blocks.rows_of(block);
    T* out = static_cast<T*>(patches.out) + image * (p.num_prefix + patches.rows) * outputs;
    if (block == 0) std::copy_n(static_cast<const T*>(p.prefix), p.num_prefix * outputs, out);
    T* inputs = scratch<T, 4>(kMaxBlock * patches.inputs);
    gather_patches(p, static_cast<const T*>(p.images) + image * p.image_stride, first, rows, inputs);
    PackedLinearParams some = some_rows<E>(patches, first, rows);
    some.x = {inputs, patches.inputs};
    some.out = out + (p.num_prefix + first) * outputs;
    multiply<E>(some, 0, blocks_of(some));
  });
}

}  // namespace linear

void packed_embed(const PackedEmbedParams& p) {
  visit_dtype(p.linear.dtype, [&](auto element) { linear::packed_embed<decltype(element)>(p); });
}

void packed_linear(const PackedLinearParams& p) {
  visit_dtype(p.dtype, [&](auto element) { linear::packed_linear<decltype(element)>(p); });
}

void packed_block(const PackedBlockParams& p) {
  visit_dtype(p.proj.dtype, [&](auto element) { linear::packed_block<decltype(element)>(p); });
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

// T is an unsigned integer of the type's size: packing moves bits.
template <typename T, int64_t kPair>
void pack_blocks(const PackLinearParams& p, int64_t begin, int64_t end) {
  const bool gated = p.gate.data != nullptr;
  const int64_t depth = packed_depth(p.inputs, p.dtype), outputs = packed_outputs(gated);
  for (int64_t b = begin; b < end; ++b) {
    T* block = static_cast<T*>(p.packed) + b * depth * kPackedColumns;
    std::fill(block, block + depth * kPackedColumns, T(0));
    const auto pack_columns = [&](const RowView& matrix, int64_t column) {
      for (int64_t n = 0; n < std::min(outputs, p.outputs - b * outputs); ++n) {
        const T* row = static_cast<const T*>(matrix.data) + (b * outputs + n) * matrix.row_stride;
        for (int64_t k = 0; k < p.inputs; ++k) {
          block[k / kPair * kPair * kPackedColumns + kPair * (column + n) + k % kPair] = row[k];
        }
      }
    };
    if (gated) pack_columns(p.gate, 0);
    pack_columns(p.weight, gated ? outputs : 0);
  }
}

}  // namespace

void pack_linear(const PackLinearParams& p) {
  parallel_for(packed_blocks(p.outputs, p.gate.data != nullptr), 1, [&](int64_t begin, int64_t end) {
    if (p.dtype == DType::kFloat32) pack_blocks<uint32_t, 1>(p, begin, end);
    else pack_blocks<uint16_t, 2>(p, begin, end);
  });
}

void packed_linear(const PackedLinearParams& p) {
  if (p.rows > 0 && p.outputs > 0) SAIT_DISPATCH(packed_linear, p);
}

void packed_block(const PackedBlockParams& p) {
  if (p.proj.rows > 0) SAIT_DISPATCH(packed_block, p);
}

void packed_embed(const PackedEmbedParams& p) {
  if (p.linear.outputs > 0) SAIT_DISPATCH(packed_embed, p);
}

}  // namespace sait::cpu
#endif
