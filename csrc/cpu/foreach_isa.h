// Compiles a kernel file once per instruction set. A kernel file looks like this:
//
//   #define SAIT_KERNEL_FILE "cpu/my_op.cpp"
//   #include "cpu/foreach_isa.h"   // includes the file again for each vector instruction set, then goes on as portable
//   #include "cpu/vec.h"
//
//   namespace sait::cpu::SAIT_ISA {
//   void my_op(const MyOpParams& params) { ... Vec ... }
//   }
//
//   #ifdef SAIT_DISPATCH_HERE
//   namespace sait::cpu {
//   void my_op(const MyOpParams& params) { SAIT_DISPATCH(my_op, params); }
//   }
//   #endif
//
// Every standard header a kernel needs is included here, before the first target pragma: code of a wider instruction
// set must not end up in an inline function that the linker may pick for everybody. For the same reason kernel code
// lives in namespace SAIT_ISA. GCC only: clang does not know the pragma, and compiles the portable code.
#ifndef SAIT_ISA

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/runtime.h"
#include "sait/types.h"

#ifdef SAIT_X86
#include <immintrin.h>

#define SAIT_ISA avx2
#define SAIT_VEC_AVX2 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include SAIT_KERNEL_FILE
#pragma GCC pop_options
#undef SAIT_VEC_AVX2
#undef SAIT_ISA

#define SAIT_ISA avx512
#define SAIT_VEC_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#include SAIT_KERNEL_FILE
#pragma GCC pop_options
#undef SAIT_ISA

#define SAIT_ISA avx512_bf16
#define SAIT_VEC_AVX512_BF16 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#include SAIT_KERNEL_FILE
#pragma GCC pop_options
#undef SAIT_VEC_AVX512_BF16
#undef SAIT_VEC_AVX512
#undef SAIT_ISA

#define SAIT_DISPATCH(function, ...)                                  \
  switch (isa()) {                                                    \
    case Isa::kAvx512Bf16: return avx512_bf16::function(__VA_ARGS__); \
    case Isa::kAvx512: return avx512::function(__VA_ARGS__);          \
    case Isa::kAvx2: return avx2::function(__VA_ARGS__);              \
    default: return portable::function(__VA_ARGS__);                  \
  }
#else
#define SAIT_DISPATCH(function, ...) return portable::function(__VA_ARGS__)
#endif

#define SAIT_ISA portable
#define SAIT_DISPATCH_HERE 1
#endif  // SAIT_ISA
