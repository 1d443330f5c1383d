// merge_tokens on the CPU. The sources of a row form a chain, so that each is found without a sort: the first of row s
// is first[s], the one behind source t is next[t], and -1 ends it. Each multiplication and addition is rounded by
// itself, so that the numbers are those of plain torch.
#define SAIT_KERNEL_FILE "cpu/merge_tokens.cpp"
#include "cpu/foreach_isa.h"
#include "cpu/vec.h"
#include "cpu/rows.h"
#include "sait/merge_tokens.h"

namespace sait::cpu::SAIT_ISA {

// kVecs vectors of a row's sum stay in registers along its chain, which starts at source t.
template <typename E, int kVecs>
inline void merge_block(const MergeTokensParams& p, const int32_t* next, int32_t t, int64_t channel,
                        typename E::type* out) {
  const int n = kVecs > 1 ? kWidth : lanes_at(channel, p.channels);
  const auto* x = static_cast<const typename E::type*>(p.x.data) + channel;
  Vec sums[kVecs];
  const auto add = [&](bool is_first) {
    const auto* row = x + t * p.x.row_stride;
    const Vec weight = set(p.weight[t]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      const Vec product = weight * load_lanes<E>(row + v * kWidth, n);
      sums[v] = is_first ? product : sums[v] + product;
    }
  };
  add(true);
  while ((t = next[t]) >= 0) add(false);
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) store_lanes<E>(out + channel + v * kWidth, sums[v], n);
}

template <typename E>
void merge_rows(const MergeTokensParams& p, const int32_t* first, const int32_t* next, int64_t begin, int64_t end) {
  using T = typename E::type;
  constexpr int kVecs = 8;  // half of the registers of AVX2
  const size_t bytes = p.channels * sizeof(T);
  for (int64_t s = begin; s < end; ++s) {
    T* out = static_cast<T*>(p.out) + s * p.channels;
    const int32_t t = first[s];
    if (t < 0) {
      std::memset(out, 0, bytes);
    } else if (next[t] < 0 && p.weight[t] == 1.f) {  // most tokens are so: not merged, a copy
      std::memcpy(out, static_cast<const T*>(p.x.data) + t * p.x.row_stride, bytes);
    } else {
      int64_t i = 0;
      for (; i + kVecs * kWidth <= p.channels; i += kVecs * kWidth) merge_block<E, kVecs>(p, next, t, i, out);
      for (; i < p.channels; i += kWidth) merge_block<E, 1>(p, next, t, i, out);
    }
  }
}

void merge_tokens(const MergeTokensParams& p, const int32_t* first, const int32_t* next, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto e) { merge_rows<decltype(e)>(p, first, next, begin, end); });
}

template <typename E>
void backward_rows(const MergeTokensBackwardParams& p, int64_t begin, int64_t end) {
  using T = typename E::type;
  for (int64_t t = begin; t < end; ++t) {
    T* dx = static_cast<T*>(p.dx) + t * p.channels;
    if (p.target[t] < 0) {
      std::memset(dx, 0, p.channels * sizeof(T));
      if (p.dweight != nullptr) p.dweight[t] = 0;
      continue;
    }
    const T* grad = static_cast<const T*>(p.grad.data) + p.target[t] * p.grad.row_stride;
    const Vec weight = set(p.weight[t]);
    if (p.dweight == nullptr) {
      for_each_vec(p.channels,
                   [=](int64_t i, int n) { store_lanes<E>(dx + i, weight * load_lanes<E>(grad + i, n), n); });
    } else {
      const T* x = static_cast<const T*>(p.x.data) + t * p.x.row_stride;
      p.dweight[t] = sum_over(p.channels, [=](int64_t i, int n) {
        const Vec g = load_lanes<E>(grad + i, n);
        store_lanes<E>(dx + i, weight * g, n);
        return load_lanes<E>(x + i, n) * g;
      });
    }
  }
}

void merge_tokens_backward(const MergeTokensBackwardParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.dtype, [&](auto e) { backward_rows<decltype(e)>(p, begin, end); });
}

}  // namespace sait::cpu::SAIT_ISA

#ifdef SAIT_DISPATCH_HERE
namespace sait::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;  // below that, one thread is done before a second one is awake

int64_t grain(int64_t row_elements) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, row_elements));
}

void merge_some(const MergeTokensParams& p, const int32_t* first, const int32_t* next, int64_t begin, int64_t end) {
  SAIT_DISPATCH(merge_tokens, p, first, next, begin, end);
}
void backward_some(const MergeTokensBackwardParams& p, int64_t begin, int64_t end) {
  SAIT_DISPATCH(merge_tokens_backward, p, begin, end);
}

}  // namespace

void merge_tokens(const MergeTokensParams& p) {
  if (p.total == 0) return;
  std::vector<int32_t> chains(p.total + p.rows, -1);
  int32_t *first = chains.data(), *next = first + p.total;
  for (int64_t t = p.rows - 1; t >= 0; --t) {  // backwards: a chain grows at its front, and ends up ascending
    if (p.target[t] < 0) continue;
    next[t] = first[p.target[t]];
    first[p.target[t]] = static_cast<int32_t>(t);
  }
  const int64_t sources = (p.rows + p.total - 1) / p.total;  // of a row, on average
  parallel_for(p.total, grain(std::max<int64_t>(1, sources) * p.channels),
               [&](int64_t begin, int64_t end) { merge_some(p, first, next, begin, end); });
}

void merge_tokens_backward(const MergeTokensBackwardParams& p) {
  parallel_for(p.rows, grain(p.channels), [&](int64_t begin, int64_t end) { backward_some(p, begin, end); });
}

}  // namespace sait::cpu
#endif
