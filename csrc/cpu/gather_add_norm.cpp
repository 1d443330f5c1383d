// gather_add_norm on the CPU: a row comes from memory once; the passes over it after that run in the L1 cache.
#define SAIT_KERNEL_FILE "cpu/gather_add_norm.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "sait/gather_add_norm.h"

namespace sait::cpu::SAIT_ISA {

template <typename E>
void forward_rows(const GatherAddNormParams& p, int64_t begin, int64_t end) {
  using T = typename E::type;
  for (int64_t t = begin; t < end; ++t) {
    const bool kept = p.indices[t] < p.total;  // else no row of x: zeros
    const T* x = static_cast<const T*>(p.x.data) + (kept ? p.indices[t] * p.x.row_stride : 0);
    const T* y = static_cast<const T*>(p.y.data) + t * p.y.row_stride;
    T* residual = static_cast<T*>(p.residual) + t * p.channels;
    T* normed = static_cast<T*>(p.normed) + t * p.channels;
    // The statistics are those of the residual as stored, so it is read back after rounding.
    const float sum = sum_over(p.channels, [=, &p](int64_t i, int n) {
      const Vec branch = load_lanes<E>(y + i, n);
      const Vec scaled = p.gamma == nullptr ? branch : load_lanes<F32>(p.gamma + i, n) * branch;
      store_lanes<E>(residual + i, kept ? load_lanes<E>(x + i, n) + scaled : scaled, n);
      return load_lanes<E>(residual + i, n);
    });
    const Moments m = moments<E>(residual, sum, p.channels, p.eps);
    for_each_vec(p.channels, [=, &p](int64_t i, int n) {
      const Vec standard = (load_lanes<E>(residual + i, n) - set(m.mean)) * set(m.rstd);
      store_lanes<E>(normed + i, fma(standard, load_lanes<F32>(p.weight + i, n), load_lanes<F32>(p.bias + i, n)), n);
    });
  }
}

void gather_add_norm(const GatherAddNormParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto e) { forward_rows<decltype(e)>(p, begin, end); });
}

// With z = (r - mean) rstd and g = grad_normed * weight, LayerNorm gives dr = rstd (g - mean(g) - z mean(g z)); the
// residual's own gradient is added to it. dweight += grad_normed z, dbias += grad_normed, dgamma += dr y.
template <typename E>
void backward_rows(const GatherAddNormBackwardParams& p, int64_t begin, int64_t end, float* partials) {
  using T = typename E::type;
  const int64_t channels = p.channels;
  const float count = static_cast<float>(channels);
  float *dweight = partials, *dbias = partials + channels, *dgamma = partials + 2 * channels;
  std::memset(partials, 0, 3 * channels * sizeof(float));
  for (int64_t t = begin; t < end; ++t) {
    const T* residual = static_cast<const T*>(p.residual.data) + t * p.residual.row_stride;
    const T* y = static_cast<const T*>(p.y.data) + t * p.y.row_stride;
    const T* grad_residual = static_cast<const T*>(p.grad_residual.data) + t * p.grad_residual.row_stride;
    const T* grad_normed = static_cast<const T*>(p.grad_normed.data) + t * p.grad_normed.row_stride;
    T* dresidual = static_cast<T*>(p.dresidual) + t * channels;
    T* dy = static_cast<T*>(p.dy) + (p.dy == nullptr ? 0 : t * channels);

    const float sum = sum_over(channels, [=](int64_t i, int n) { return load_lanes<E>(residual + i, n); });
    const Moments m = moments<E>(residual, sum, channels, p.eps);
    const float mean_g = sum_over(channels,
                                  [=, &p](int64_t i, int n) {
                                    return load_lanes<E>(grad_normed + i, n) * load_lanes<F32>(p.weight + i, n);
                                  }) /
                         count;
    const float mean_gz = sum_over(channels,
                                   [=, &p](int64_t i, int n) {
                                     const Vec z = (load_lanes<E>(residual + i, n) - set(m.mean)) * set(m.rstd);
                                     return load_lanes<E>(grad_normed + i, n) * load_lanes<F32>(p.weight + i, n) * z;
                                   }) /
                          count;
    for_each_vec(channels, [=, &p](int64_t i, int n) {
      const Vec z = (load_lanes<E>(residual + i, n) - set(m.mean)) * set(m.rstd);
      const Vec grad = load_lanes<E>(grad_normed + i, n);
      const Vec g = grad * load_lanes<F32>(p.weight + i, n);
      const Vec dr = fma(set(m.rstd), g - set(mean_g) - z * set(mean_gz), load_lanes<E>(grad_residual + i, n));
      store_lanes<E>(dresidual + i, dr, n);
      store_lanes<F32>(dweight + i, fma(grad, z, load_lanes<F32>(dweight + i, n)), n);
      store_lanes<F32>(dbias + i, load_lanes<F32>(dbias + i, n) + grad, n);
      if (p.gamma != nullptr) {
        store_lanes<E>(dy + i, dr * load_lanes<F32>(p.gamma + i, n), n);
        store_lanes<F32>(dgamma + i, fma(dr, load_lanes<E>(y + i, n), load_lanes<F32>(dgamma + i, n)), n);
      }
    });
  }
}

void gather_add_norm_backward(const GatherAddNormBackwardParams& p, int64_t begin, int64_t end, float* partials) {
  visit_dtype(p.dtype, [&](auto e) { backward_rows<decltype(e)>(p, begin, end, partials); });
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // below that, one thread is done before a second one is awake
constexpr int64_t kGroup = 64;             // channels summed side by side

void forward(const GatherAddNormParams& p, int64_t begin, int64_t end) {
  SAIT_DISPATCH(gather_add_norm, p, begin, end);
}
void backward(const GatherAddNormBackwardParams& p, int64_t begin, int64_t end, float* partials) {
  SAIT_DISPATCH(gather_add_norm_backward, p, begin, end, partials);
}

}  // namespace

void gather_add_norm(const GatherAddNormParams& p) {
  parallel_for(p.rows, std::max<int64_t>(1, kGrainElements / p.channels),
               [&](int64_t begin, int64_t end) { forward(p, begin, end); });
}

void gather_add_norm_backward(const GatherAddNormBackwardParams& p) {
  const int64_t chunks = (p.rows + kGatherAddNormChunk - 1) / kGatherAddNormChunk;
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * kGatherAddNormChunk;
      backward(p, begin, std::min(begin + kGatherAddNormChunk, p.rows), p.partials + c * 3 * p.channels);
    }
  });
  float* const sums[] = {p.dweight, p.dbias, p.dgamma};
  const int64_t groups = (p.channels + kGroup - 1) / kGroup;
  parallel_for(groups, kGrainElements / kGroup, [&](int64_t first, int64_t last) {
    for (int64_t s = 0; s < (p.gamma == nullptr ? 2 : 3); ++s) {
      for (int64_t i = first * kGroup; i < std::min(last * kGroup, p.channels); i += kGroup) {
        const int64_t width = std::min(kGroup, p.channels - i);
        double total[kGroup] = {};
        for (int64_t c = 0; c < chunks; ++c) {
          const float* partial = p.partials + (c * 3 + s) * p.channels + i;
          for (int64_t j = 0; j < width; ++j) total[j] += partial[j];
        }
        for (int64_t j = 0; j < width; ++j) sums[s][i + j] = static_cast<float>(total[j]);
      }
    }
  });
}

}  // namespace sait::cpu
#endif
