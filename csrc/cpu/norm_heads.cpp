// norm_heads on the CPU.
#define SAIT_KERNEL_FILE "cpu/norm_heads.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "sait/norm_heads.h"

namespace sait::cpu::SAIT_ISA {

template <typename E>
void norm_rows(const NormHeadsParams& p, int64_t begin, int64_t end) {
  using T = typename E::type;
  const int64_t D = p.head_dim;
  for (int64_t t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(p.x.data) + t * p.x.row_stride;
    T* out = static_cast<T*>(p.out) + t * p.heads * D;
    for (int64_t h = 0; h < p.heads; ++h, x += p.x.head_stride, out += D) {
      const float sum = sum_over(D, [=](int64_t i, int n) { return load_lanes<E>(x + i, n); });
      const Moments m = moments<E>(x, sum, D, p.eps);
      for_each_vec(D, [=, &p](int64_t i, int n) {
        const Vec standard = (load_lanes<E>(x + i, n) - set(m.mean)) * set(m.rstd);
        store_lanes<E>(out + i, fma(standard, load_lanes<F32>(p.weight + i, n), load_lanes<F32>(p.bias + i, n)), n);
      });
    }
  }
}

void norm_heads(const NormHeadsParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto element) { norm_rows<decltype(element)>(p, begin, end); });
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // below that, one thread is done before a second one is awake

void norm_some(const NormHeadsParams& p, int64_t begin, int64_t end) { SAIT_DISPATCH(norm_heads, p, begin, end); }

}  // namespace

void norm_heads(const NormHeadsParams& p) {
  parallel_for(p.rows, std::max<int64_t>(1, kGrainElements / (p.heads * p.head_dim)),
               [&](int64_t begin, int64_t end) { norm_some(p, begin, end); });
}

}  // namespace sait::cpu
#endif
