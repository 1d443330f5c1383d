// rotate on the CPU: sine and cosine of a few channels stay in registers for all heads of a row, of q and of k. Both
// multiplications and the addition are rounded one by one, so that the numbers are those of plain torch.
#define SAIT_KERNEL_FILE "cpu/rotate.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "sait/rotate.h"

namespace sait::cpu::SAIT_ISA {

alignas(64) constexpr float kAlternating[] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
static_assert(kWidth <= sizeof(kAlternating) / sizeof(float));

inline Vec negated(Vec a) { return a * set(-1.f); }

// n channels from i on of the first half, and of the second; `sin` and `cos` of one head.
struct Halves {
  Vec cos1, cos2, w1, w2;
  int64_t half;

  Halves(const float* sin, int64_t i, int n, const RotateParams& p) : half(p.head_dim / 2) {
    const float* cos = sin + p.head_dim;
    const Vec sin1 = load_lanes<F32>(sin + i, n), sin2 = load_lanes<F32>(sin + half + i, n);
    cos1 = load_lanes<F32>(cos + i, n), cos2 = load_lanes<F32>(cos + half + i, n);
    w1 = p.transposed ? sin2 : negated(sin1), w2 = p.transposed ? negated(sin1) : sin2;
  }
  template <typename E>
  void turn(const typename E::type* x, typename E::type* out, int n) const {
    const Vec x1 = load_lanes<E>(x, n), x2 = load_lanes<E>(x + half, n);
    store_lanes<E>(out, x1 * cos1 + x2 * w1, n);
    store_lanes<E>(out + half, x2 * cos2 + x1 * w2, n);
  }
  static int64_t channels(const RotateParams& p) { return p.head_dim / 2; }
};

// n channels from i on, of which neighbours turn together.
struct Pairs {
  Vec cos, w;

  Pairs(const float* sin, int64_t i, int n, const RotateParams& p) {
    cos = load_lanes<F32>(sin + p.head_dim + i, n);
    w = load_lanes<F32>(sin + i, n) * load(kAlternating);
    if (p.transposed) w = swap_neighbours(w);
  }
  template <typename E>
  void turn(const typename E::type* x, typename E::type* out, int n) const {
    const Vec both = load_lanes<E>(x, n);
    store_lanes<E>(out, both * cos + swap_neighbours(both) * w, n);
  }
  static int64_t channels(const RotateParams& p) { return p.head_dim; }
};

template <typename E, typename Turned>
void rotate_rows(const RotateParams& p, int64_t begin, int64_t end) {
  using T = typename E::type;
  const int64_t size = p.heads * p.head_dim;
  const HeadView views[] = {p.q, p.k};
  void* const outs[] = {p.q_out, p.k_out};
  for (int64_t t = begin; t < end; ++t) {
    const T* rows[2];
    T* results[2];
    for (int side = 0; side < 2; ++side) {
      rows[side] = static_cast<const T*>(views[side].data) + t * views[side].row_stride;
      results[side] = static_cast<T*>(outs[side]) + t * size;
    }
    const int64_t position = p.positions[t];
    if (position < 0 || position >= p.entries) {
      for (int side = 0; side < 2; ++side) {
        for (int64_t h = 0; h < p.heads; ++h) {
          std::memcpy(results[side] + h * p.head_dim, rows[side] + h * views[side].head_stride, p.head_dim * sizeof(T));
        }
      }
      continue;
    }
    const float* entry = p.table + position * p.table_row_stride;
    const bool shared = p.table_head_stride == 0;
    for (int64_t first = 0; first < p.heads; first += shared ? p.heads : 1) {
      const int64_t last = shared ? p.heads : first + 1;
      for_each_vec(Turned::channels(p), [&](int64_t i, int n) {
        const Turned turned(entry + first * p.table_head_stride, i, n, p);
        for (int side = 0; side < 2; ++side) {
          const int64_t stride = views[side].head_stride;
          for (int64_t h = first; h < last; ++h) {
            turned.template turn<E>(rows[side] + h * stride + i, results[side] + h * p.head_dim + i, n);
          }
        }
      });
    }
  }
}

void rotate(const RotateParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto e) {
    using E = decltype(e);
    p.pairs ? rotate_rows<E, Pairs>(p, begin, end) : rotate_rows<E, Halves>(p, begin, end);
  });
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // below that, one thread is done before a second one is awake

void rotate_some(const RotateParams& p, int64_t begin, int64_t end) { SAIT_DISPATCH(rotate, p, begin, end); }

}  // namespace

void rotate(const RotateParams& p) {
  parallel_for(p.rows, std::max<int64_t>(1, kGrainElements / (2 * p.heads * p.head_dim)),
               [&](int64_t begin, int64_t end) { rotate_some(p, begin, end); });
}

}  // namespace sait::cpu
#endif
