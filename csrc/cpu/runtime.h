// What a CPU kernel needs from the host: threads, ATen's brgemm, and the instruction set in force. No torch header
// here; runtime.cpp is the one file that bridges to ATen.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SAIT_X86 1  // the vector instruction sets of foreach_isa.h can be compiled
#endif

namespace sait::cpu {

// Ordered: a later one includes the earlier ones.
enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

Isa best_isa();  // what this machine can run
Isa isa();  // what is in force: best_isa() unless lowered
void set_isa(Isa isa);  // lowers it (tests); raising it above best_isa() throws
const char* isa_name(Isa isa);
Isa isa_from_name(const char* name);

// ATen's brgemm: oneDNN kernels, just-in-time compiled per shape and per thread, so callers must keep the number of
// distinct (M, N, K, ld) small. Available from AVX-512 on, when this torch has it and torch.backends.mkldnn is enabled.
bool has_brgemm_f32();
bool has_brgemm_bf16();
// C (M, N) = A (M, K) B (K, N), += when accumulate. Row-major, leading dimensions in elements.
void brgemm_f32(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C,
                int64_t ldc, bool accumulate);
// B in VNNI order: element (k, n) at [(k / 2) * 2 * ldb + 2 * n + k % 2]; K even.
void brgemm_bf16(int64_t M, int64_t N, int64_t K, const uint16_t* A, int64_t lda, const uint16_t* B, int64_t ldb,
                 float* C, int64_t ldc, bool accumulate);
void brgemm_release();  // once per thread and parallel region that called brgemm

int num_threads();
using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
void parallel_ranges(int64_t size, int64_t grain, void* context, RangeFn fn);

// body(begin, end) over [0, size) on torch's intra-op threads.
template <typename Body>
void parallel_for(int64_t size, int64_t grain, Body&& body) {
  parallel_ranges(size, grain, &body,
                  [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); });
}

}  // namespace sait::cpu
