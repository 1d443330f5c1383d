// The activations of packed_linear. Included once per instruction set, after cpu/vec.h; no include guard.
#include "sait/packed_linear.h"

namespace sait::cpu::SAIT_ISA {

// Phi(-a) = exp(-a^2 / 2) M(a), and with y = 1 / (1 + c a) M(a) is y times a polynomial of y (minimax, a <= 8): of degree
// 7 off by 5e-8 of its value, of degree 4 by 2.4e-5. For a bfloat16 result, rounded by 2e-3, that will do, and so will
// 6e-5 for y.
template <bool kBFloat16Result>
inline Vec normal_tail(Vec a) {
  constexpr float kMills7[] = {0.11961029f,  0.12104787f, 0.09807437f,  0.13463151f,
                               -0.06514996f, 0.21880573f, -0.16443044f, 0.03741066f};
  constexpr float kMills4[] = {0.10177416f, 0.077224231f, 0.18940949f, -0.11425918f, 0.2458631f};
  constexpr float kHalfLog2e = 0.72134752f;
  Vec y, mills;
  if constexpr (kBFloat16Result) {
    y = approximate_reciprocal(fma(a, set(0.25f), set(1.f)));
    mills = set(kMills4[4]);
    for (int i = 3; i >= 0; --i) mills = fma(mills, y, set(kMills4[i]));
  } else {
    y = reciprocal(fma(a, set(0.3f), set(1.f)));
    mills = set(kMills7[7]);
    for (int i = 6; i >= 0; --i) mills = fma(mills, y, set(kMills7[i]));
  }
  return exp2<kBFloat16Result>(a * a * set(-kHalfLog2e)) * mills * y;
}

// sigmoid(-v) = e / (1 + e) with e = exp(-v) = 2^t, t <= 0.
template <bool kBFloat16Result>
inline Vec sigmoid_tail(Vec t) {
  const Vec e = exp2<kBFloat16Result>(t), sum = e + set(1.f);
  if constexpr (kBFloat16Result) return e * approximate_reciprocal(sum);
  else return e * reciprocal(sum);
}

// S(-a) of the activation x S(x), for a >= 0.
template <Activation kActivation, bool kBFloat16Result>
inline Vec activation_tail(Vec a) {
  constexpr float kLog2e = 1.44269504f;
  if constexpr (kActivation == Activation::kGelu) {
    return normal_tail<kBFloat16Result>(a);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
    constexpr float kLinear = -2.30220819f, kCubic = -0.102943239f;  // of -2 u log2(e)
    return sigmoid_tail<kBFloat16Result>(a * fma(a * a, set(kCubic), set(kLinear)));
  } else if constexpr (kActivation == Activation::kQuickGelu) {
    return sigmoid_tail<kBFloat16Result>(a * set(-1.702f * kLog2e));
  } else {
    static_assert(kActivation == Activation::kSilu);
    return sigmoid_tail<kBFloat16Result>(a * set(-kLog2e));
  }
}

// All of them are x S(x) with S(x) = 1 - S(-x), and that is max(x, 0) - a S(-a) with a = |x|, which loses no digits where
// S(x) is nearly 0.
template <Activation kActivation, bool kBFloat16Result>
inline Vec activate(Vec x) {
  if constexpr (kActivation == Activation::kNone) {
    return x;
  } else {
    // Beyond 128 the second term is 0, and infinity times 0 is none.
    const Vec a = min(max(x, set(0.f) - x), set(128.f));
    const Vec tail = activation_tail<kActivation, kBFloat16Result>(a);
    return max(set(0.f), x) - a * tail;  // in this order a NaN stays a NaN
  }
}

// visit(constant) with the activation as a constant of the compiler's.
template <typename Visitor>
inline auto visit_activation(Activation activation, Visitor&& visitor) {
  switch (activation) {
    case Activation::kGelu: return visitor(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh: return visitor(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kQuickGelu: return visitor(std::integral_constant<Activation, Activation::kQuickGelu>{});
    case Activation::kSilu: return visitor(std::integral_constant<Activation, Activation::kSilu>{});
    default: return visitor(std::integral_constant<Activation, Activation::kNone>{});
  }
}

}  // namespace sait::cpu::SAIT_ISA
