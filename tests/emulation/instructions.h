// The functions of csrc/cuda/instructions.cuh on the host. Collectives and matrices follow the PTX ISA's tables; what a
// device leaves undefined is an error here, with the block, the thread and the line.
#pragma once

#include "machine.h"

#define SAIT_DEVICE inline
#define SAIT_HAS_CLUSTERS 1

namespace sait::cuda {

using emulation::machine;
using emulation::Where;

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

namespace host {

// apply(lanes) for the 32 arguments of a warp, once all of its lanes are here.
template <typename Lane, typename Apply>
SAIT_UNCHECKED void collective(const char* name, Where where, Lane& mine, Apply apply) {
  if (machine.arrive(name, where, &mine)) {
    Lane* lanes[kWarpSize];
    for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane] = static_cast<Lane*>(machine.lanes()[lane]);
    apply(lanes);
    machine.release_warp();
  }
  machine.wait();
}

// Each lane gets the value of the lane that it names.
template <typename T>
T exchange(const char* name, Where where, T value, int source) {
  struct Lane {
    T value, result;
    int source;
  } mine{value, {}, source % kWarpSize};
  collective(name, where, mine, [](Lane** lanes) SAIT_UNCHECKED {
    for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane]->result = lanes[lanes[lane]->source]->value;
  });
  return mine.result;
}

template <typename T>
T exchange_xor(Where where, T value, int mask) {
  return exchange("shuffle_xor", where, value, machine.self().lane ^ mask);
}
template <typename T>
T exchange_lane(Where where, T value, int from) {
  return exchange("shuffle", where, value, from & (kWarpSize - 1));
}
template <typename T>
T exchange_up(Where where, T value, int delta) {
  const int lane = machine.self().lane;
  return exchange("shuffle_up", where, value, lane < delta ? lane : lane - delta);
}

template <typename Combine>
int reduce(const char* name, Where where, int value, Combine combine) {
  struct Lane {
    int value;
  } mine{value};
  collective(name, where, mine, [combine](Lane** lanes) {
    int total = lanes[0]->value;
    for (int lane = 1; lane < kWarpSize; ++lane) total = combine(total, lanes[lane]->value);
    for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane]->value = total;
  });
  return mine.value;
}

inline void check_aligned(const char* name, Where where, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    machine.fail(where, "%s: address %p is not a multiple of 16", name, address);
  }
}
inline void check_shared(const char* name, Where where, const void* address) {
  if (machine.in_shared_memory(address, 16)) return;
  const auto offset = static_cast<const unsigned char*>(address) - machine.self().block->shared;
  machine.fail(where, "%s: byte %td is outside of the block's %d bytes of shared memory", name, offset,
               machine.shared_bytes());
}

struct MatrixRow {
  uint32_t (*r)[4];
  const void* address;
};
template <bool transposed>
void load_matrices(const char* name, Where where, uint32_t (&r)[4], const void* address) {
  check_aligned(name, where, address);
  check_shared(name, where, address);
  MatrixRow mine{&r, address};
  collective(name, where, mine, [](MatrixRow** lanes) SAIT_UNCHECKED {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      for (int row = 0; row < 8; ++row) std::memcpy(element[row], lanes[8 * matrix + row]->address, 16);
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const int i = lane / 4, j = 2 * (lane % 4);
        const uint32_t low = transposed ? element[j][i] : element[i][j];
        const uint32_t high = transposed ? element[j + 1][i] : element[i][j + 1];
        (*lanes[lane]->r)[matrix] = low | high << 16;
      }
    }
  });
}

SAIT_UNCHECKED inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
SAIT_UNCHECKED inline float widened(__half x) { return __half2float(x); }

struct Fragments {
  float (*c)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];
};
// Sums in float32, one product after the other along k; the products of two 16-bit numbers are exact in it.
template <typename T>
void multiply_add(const char* name, Where where, Fragments mine) {
  collective(name, where, mine, [](Fragments** lanes) SAIT_UNCHECKED {
    typedef float Row __attribute__((vector_size(32)));
    float a[16][16];
    Row b[16], c[16];
    const auto element = [](uint32_t pair, int high)
                             SAIT_UNCHECKED { return widened(T{static_cast<uint16_t>(pair >> (16 * high))}); };
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const Fragments& f = *lanes[lane];
      for (int j = 0; j < 2; ++j) {
        a[g][2 * t + j] = element((*f.a)[0], j);
        a[g + 8][2 * t + j] = element((*f.a)[1], j);
        a[g][2 * t + 8 + j] = element((*f.a)[2], j);
        a[g + 8][2 * t + 8 + j] = element((*f.a)[3], j);
        b[2 * t + j][g] = element(f.b[0], j);
        b[2 * t + 8 + j][g] = element(f.b[1], j);
        c[g][2 * t + j] = (*f.c)[j];
        c[g + 8][2 * t + j] = (*f.c)[2 + j];
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) c[row] += a[row][k] * b[k];
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int j = 0; j < 2; ++j) {
        (*lanes[lane]->c)[j] = c[g][2 * t + j];
        (*lanes[lane]->c)[2 + j] = c[g + 8][2 * t + j];
      }
    }
  });
}

}  // namespace host

inline unsigned char* shared_memory() { return machine.self().block->shared; }

// Barriers ------------------------------------------------------------------------------------------------------------
inline void sync_block(Where where = Where::current()) { machine.sync_block(where); }
inline void sync_warp(Where where = Where::current()) {
  struct Lane {
  } mine;
  host::collective("sync_warp", where, mine, [](Lane**) {});
}

[[noreturn]] inline void trap(Where where = Where::current()) { machine.fail(where, "trap"); }

inline float shuffle_xor(float value, int mask, Where where = Where::current()) {
  return host::exchange_xor(where, value, mask);
}
inline int shuffle_xor(int value, int mask, Where where = Where::current()) {
  return host::exchange_xor(where, value, mask);
}
inline uint32_t shuffle_xor(uint32_t value, int mask, Where where = Where::current()) {
  return host::exchange_xor(where, value, mask);
}
inline double shuffle_xor(double value, int mask, Where where = Where::current()) {
  return host::exchange_xor(where, value, mask);
}
inline int shuffle(int value, int lane, Where where = Where::current()) {
  return host::exchange_lane(where, value, lane);
}
inline int shuffle_up(int value, int delta, Where where = Where::current()) {
  return host::exchange_up(where, value, delta);
}
inline uint32_t ballot(bool predicate, Where where = Where::current()) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  host::collective("ballot", where, mine, [](Lane** lanes) {
    uint32_t all = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) all |= static_cast<uint32_t>(lanes[lane]->predicate) << lane;
    for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane]->result = all;
  });
  return mine.result;
}
inline int reduce_add(int value, Where where = Where::current()) {  // wraps around, as on the device
  return host::reduce("reduce_add", where, value, [](int a, int b) {
    return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  });
}
inline int reduce_max(int value, Where where = Where::current()) {
  return host::reduce("reduce_max", where, value, [](int a, int b) { return std::max(a, b); });
}
inline int reduce_min(int value, Where where = Where::current()) {
  return host::reduce("reduce_min", where, value, [](int a, int b) { return std::min(a, b); });
}

// Between blocks ------------------------------------------------------------------------------------------------------
inline int atomic_add(int32_t* address, int value) {
  const int before = *address;
  *address = before + value;
  return before;
}

// Memory --------------------------------------------------------------------------------------------------------------
inline uint4 load_16(const void* global, Where where = Where::current()) {
  host::check_aligned("load_16", where, global);
  if (machine.is_shared(global)) machine.fail(where, "load_16: reads global memory only");
  return *static_cast<const uint4*>(global);
}
inline void store_16(void* global, uint4 value, Where where = Where::current()) {
  host::check_aligned("store_16", where, global);
  *static_cast<uint4*>(global) = value;
}

// The target holds NaN from the start of the copy, since the device may write at any time; the copy itself is done by
// the wait.
inline void copy_async_16(void* shared, const void* global, bool valid = true, Where where = Where::current()) {
  host::check_aligned("copy_async_16", where, shared);
  host::check_shared("copy_async_16", where, shared);
  if (valid) {
    host::check_aligned("copy_async_16", where, global);
    if (machine.is_shared(global)) machine.fail(where, "copy_async_16: copies from global memory only");
  }
  std::memset(shared, 0xff, 16);
  machine.self().copies.push_back({shared, valid ? global : nullptr});
  ++machine.self().uncommitted;
}
inline void copies_commit() {
  auto& fiber = machine.self();
  fiber.groups.push_back(fiber.uncommitted);
  fiber.uncommitted = 0;
}
template <int pending>
void copies_wait() {
  auto& fiber = machine.self();
  if (fiber.groups.size() <= pending) return;
  const auto groups = fiber.groups.end() - pending;
  size_t landed = 0;
  for (auto group = fiber.groups.begin(); group != groups; ++group) landed += *group;
  for (size_t i = 0; i < landed; ++i) {
    const emulation::Copy& copy = fiber.copies[i];
    if (copy.global == nullptr) std::memset(copy.shared, 0, 16);
    else std::memcpy(copy.shared, copy.global, 16);
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<ptrdiff_t>(landed));
  fiber.groups.erase(fiber.groups.begin(), groups);
}

// Matrices ------------------------------------------------------------------------------------------------------------
inline void load_matrices_4(uint32_t (&r)[4], const void* shared_row, Where where = Where::current()) {
  host::load_matrices<false>("load_matrices_4", where, r, shared_row);
}
inline void load_matrices_4_transposed(uint32_t (&r)[4], const void* shared_row, Where where = Where::current()) {
  host::load_matrices<true>("load_matrices_4_transposed", where, r, shared_row);
}
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16,
                         Where where = Where::current()) {
  host::multiply_add<__nv_bfloat16>("multiply_add of bfloat16", where, {&c, &a, {b0, b1}});
}
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half,
                         Where where = Where::current()) {
  host::multiply_add<__half>("multiply_add of half", where, {&c, &a, {b0, b1}});
}

// Numbers -------------------------------------------------------------------------------------------------------------
inline float exp2_fast(float x) {  // subnormal numbers count as zero, going in and coming out
  const float result = std::exp2(std::fpclassify(x) == FP_SUBNORMAL ? 0.f : x);
  return std::fpclassify(result) == FP_SUBNORMAL ? 0.f : result;
}
inline uint32_t pack(float low, float high, __nv_bfloat16) {
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits) << 16;
}
inline uint32_t pack(float low, float high, __half) {
  return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
}
template <typename T>
float2 unpack(uint32_t pair, T) {
  return {host::widened(T{static_cast<uint16_t>(pair)}), host::widened(T{static_cast<uint16_t>(pair >> 16)})};
}
inline int count_bits(uint32_t bits) { return std::popcount(bits); }
inline double rounded_product(double a, double b) {
  volatile double product = a * b;  // keeps the host's compiler from fusing it, too
  return product;
}
inline float rounded_product(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of_bits(uint32_t bits) { return std::bit_cast<float>(bits); }

// Clusters ------------------------------------------------------------------------------------------------------------
namespace host {
inline void check_clusters(const char* name, Where where) {
  if (emulation::compiled_for() < 90) machine.fail(where, "%s: clusters begin with sm_90", name);
}
}  // namespace host
inline int cluster_rank(Where where = Where::current()) {
  host::check_clusters("cluster_rank", where);
  return machine.rank();
}
template <typename T>
T* in_block(T* shared, int rank, Where where = Where::current()) {
  const auto offset = reinterpret_cast<unsigned char*>(shared) - machine.self().block->shared;
  if (offset < 0 || offset > machine.shared_bytes()) machine.fail(where, "in_block: not in the block's shared memory");
  if (rank < 0 || rank >= machine.cluster()) machine.fail(where, "in_block: no block %d in the cluster", rank);
  return reinterpret_cast<T*>(machine.block(rank).shared + offset);
}
inline void cluster_arrive(Where where = Where::current()) {
  host::check_clusters("cluster_arrive", where);
  machine.cluster_arrive(where);
}
inline void cluster_arrive_relaxed(Where where = Where::current()) {
  host::check_clusters("cluster_arrive_relaxed", where);
  machine.cluster_arrive(where);
}
inline void cluster_wait(Where where = Where::current()) {
  host::check_clusters("cluster_wait", where);
  machine.cluster_wait(where);
}

}  // namespace sait::cuda
