// Every hardware instruction that the kernels use, one function each. Nothing else in csrc/cuda holds inline PTX or an
// intrinsic, so a kernel runs wherever these functions do: on the device here, thread for thread on the host in
// `make emulate`, whose tests/emulation/instructions.h has the same functions. Names say what they do; the PTX name
// stands behind them.
#pragma once

#ifdef SAIT_EMULATE
#include "instructions.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define SAIT_DEVICE __device__ __forceinline__

namespace sait::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The block's dynamic shared memory, aligned to 16 bytes. All shared memory is dynamic.
SAIT_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Barriers ------------------------------------------------------------------------------------------------------------
SAIT_DEVICE void sync_block() { __syncthreads(); }
SAIT_DEVICE void sync_warp() { __syncwarp(); }
SAIT_DEVICE void trap() { __trap(); }  // ends the launch with an error

// All 32 lanes take part, always.
SAIT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(kFullWarp, value, mask); }
SAIT_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(kFullWarp, value, mask); }
SAIT_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(kFullWarp, value, mask); }
SAIT_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(kFullWarp, value, mask); }
SAIT_DEVICE int shuffle(int value, int lane) { return __shfl_sync(kFullWarp, value, lane); }
SAIT_DEVICE int shuffle_up(int value, int delta) { return __shfl_up_sync(kFullWarp, value, delta); }
SAIT_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kFullWarp, predicate); }
SAIT_DEVICE int reduce_add(int value) { return __reduce_add_sync(kFullWarp, value); }  // redux.sync, sm_80
SAIT_DEVICE int reduce_max(int value) { return __reduce_max_sync(kFullWarp, value); }
SAIT_DEVICE int reduce_min(int value) { return __reduce_min_sync(kFullWarp, value); }

// Between blocks ------------------------------------------------------------------------------------------------------
SAIT_DEVICE int atomic_add(int32_t* address, int value) { return atomicAdd(address, value); }

// Memory --------------------------------------------------------------------------------------------------------------
// 16 bytes, aligned, that no thread of this launch writes (ld.global.nc).
SAIT_DEVICE uint4 load_16(const void* global) { return __ldg(static_cast<const uint4*>(global)); }
SAIT_DEVICE void store_16(void* global, uint4 value) { *static_cast<uint4*>(global) = value; }

// Copies 16 aligned bytes from global to shared memory without registers, or writes zeros where `valid` is false
// (cp.async.cg). They are there for this thread after copies_wait, for others after a barrier behind it.
SAIT_DEVICE void copy_async_16(void* shared, const void* global, bool valid = true) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
SAIT_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's committed groups are under way, the youngest ones.
template <int pending>
SAIT_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Matrices ------------------------------------------------------------------------------------------------------------
// Four 8x8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8 (ldmatrix). Lane l gets
// elements 2 (l % 4) and the next of row l / 4; transposed, of column l / 4.
SAIT_DEVICE void load_matrices_4(uint32_t (&r)[4], const void* shared_row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
SAIT_DEVICE void load_matrices_4_transposed(uint32_t (&r)[4], const void* shared_row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b, a 16x16, b 16x8, c 16x8 in float32 (mma.sync.m16n8k16). With g = lane / 4 and t = lane % 4 a lane holds
// a[0], a[1]: rows g and g + 8, columns 2t and 2t + 1;  a[2], a[3]: the same rows, columns 8 further;
// b0, b1:     rows 2t, 2t + 1 and 8 further, column g;   c: row g, columns 2t, 2t + 1; row g + 8, the same.
SAIT_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SAIT_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Numbers -------------------------------------------------------------------------------------------------------------
SAIT_DEVICE float exp2_fast(float x) {  // ex2.approx.ftz: 2 ulp, 0 for -inf
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
// Two float32 numbers rounded to 16 bits each, the first in the lower half.
SAIT_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
SAIT_DEVICE uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
SAIT_DEVICE float2 unpack(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
SAIT_DEVICE float2 unpack(uint32_t pair, __half) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
SAIT_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
// a b, rounded before anything is added: the compiler cannot fuse it with an addition, which would round once.
SAIT_DEVICE double rounded_product(double a, double b) { return __dmul_rn(a, b); }
SAIT_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }
SAIT_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
SAIT_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

// Clusters, sm_90 -----------------------------------------------------------------------------------------------------
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SAIT_HAS_CLUSTERS 1
// The block's place in its cluster. Clusters are one-dimensional, along x.
SAIT_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Where `shared`, an address in this block's shared memory, lies in that of block `rank` (mapa). Valid while that block
// runs: a barrier has to follow the last access.
template <typename T>
SAIT_DEVICE T* in_block(T* shared, int rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
}
SAIT_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// The same, without making this thread's writes visible to the others, which costs a fence for all memory.
SAIT_DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
SAIT_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#endif

}  // namespace sait::cuda
#endif
