// Vec: one hardware vector of float, and what kernels do with it. Included once per instruction set (foreach_isa.h), so
// no include guard. `n` is a number of leading lanes, 0 <= n <= kWidth; lanes past it load as zero, are not stored.
namespace sait::cpu::SAIT_ISA {

#if defined(SAIT_VEC_AVX512)

constexpr int kWidth = 16;
struct Vec {
  __m512 v;
};

inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
inline Vec set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline Vec first(Vec a, int n, float rest) { return {_mm512_mask_blend_ps(lanes(n), _mm512_set1_ps(rest), a.v)}; }
inline Vec swap_neighbours(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }  // lanes 1, 0, 3, 2, ...
// x * 2^k for integral k
inline Vec scale_by_power(Vec x, Vec k) { return {_mm512_scalef_ps(x.v, k.v)}; }
inline Vec round_to_nearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline Vec widen(__m256i half, DType type) {
  if (type == DType::kFloat16) return {_mm512_cvtph_ps(half)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline __m256i narrow(Vec a, DType type) {
  if (type == DType::kFloat16) return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#if defined(SAIT_VEC_AVX512_BF16)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16));
#endif
}
inline __m256i load_half(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load_half(const uint16_t* p, int n) { return _mm256_maskz_loadu_epi16(lanes(n), p); }
inline void store_half(uint16_t* p, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline void store_half(uint16_t* p, __m256i a, int n) { _mm256_mask_storeu_epi16(p, lanes(n), a); }

#elif defined(SAIT_VEC_AVX2)

constexpr int kWidth = 8;
struct Vec {
  __m256 v;
};

inline __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec set(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, lanes(n), a.v); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline Vec first(Vec a, int n, float rest) {
  return {_mm256_blendv_ps(_mm256_set1_ps(rest), a.v, _mm256_castsi256_ps(lanes(n)))};
}
inline Vec swap_neighbours(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }  // lanes 1, 0, 3, 2, ...
// x * 2^k for integral k, by two multiplications so that the smallest results do not overflow the exponent field
inline Vec scale_by_power(Vec x, Vec k) {
  const __m256i power =
      _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(k.v, _mm256_set1_ps(252.f)), _mm256_set1_ps(-252.f)));
  const __m256i half = _mm256_srai_epi32(power, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(power, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(x.v, low), high)};
}
inline Vec round_to_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

inline Vec widen(__m128i half, DType type) {
  if (type == DType::kFloat16) return {_mm256_cvtph_ps(half)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline __m128i narrow(Vec a, DType type) {
  if (type == DType::kFloat16) return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256i result =
      _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                             _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan)),
                        16);
  return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
}
inline __m128i load_half(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m128i load_half(const uint16_t* p, int n) {
  alignas(16) uint16_t buffer[8] = {};
  std::memcpy(buffer, p, n * sizeof(uint16_t));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(buffer));
}
inline void store_half(uint16_t* p, __m128i a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
inline void store_half(uint16_t* p, __m128i a, int n) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(buffer), a);
  std::memcpy(p, buffer, n * sizeof(uint16_t));
}

#else  // portable: plain loops that any compiler may vectorise

constexpr int kWidth = 8;
struct Vec {
  float v[kWidth];
};
struct Half {
  uint16_t v[kWidth];
};

template <typename Lane>
inline Vec map(Lane lane) {
  Vec r;
  for (int i = 0; i < kWidth; ++i) r.v[i] = lane(i);
  return r;
}
inline Vec set(float x) {
  return map([=](int) { return x; });
}
inline Vec load(const float* p) {
  return map([=](int i) { return p[i]; });
}
inline Vec load(const float* p, int n) {
  return map([=](int i) { return i < n ? p[i] : 0.f; });
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline void store(float* p, Vec a, int n) { std::memcpy(p, a.v, n * sizeof(float)); }
inline Vec operator+(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline float sum(Vec a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
inline float max(Vec a) { return *std::max_element(a.v, a.v + kWidth); }
inline Vec first(Vec a, int n, float rest) {
  return map([&](int i) { return i < n ? a.v[i] : rest; });
}
inline Vec swap_neighbours(Vec a) {  // lanes 1, 0, 3, 2, ...
  return map([&](int i) { return a.v[i ^ 1]; });
}
// x * 2^k for integral k
inline Vec scale_by_power(Vec x, Vec k) {
  return map([&](int i) { return std::ldexp(x.v[i], static_cast<int>(max(min(k, set(300.f)), set(-300.f)).v[i])); });
}
inline Vec round_to_nearest(Vec a) {
  return map([&](int i) { return std::nearbyint(a.v[i]); });
}

inline float widen(uint16_t half, DType type) {
  uint32_t bits;
  if (type == DType::kBFloat16) {
    bits = static_cast<uint32_t>(half) << 16;
  } else {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // inf, nan
      bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    } else if (magnitude >= 0x0400u) {  // normal: exponent bias 15 -> 127
      bits = sign | ((magnitude << 13) + (112u << 23));
    } else {  // subnormal: magnitude * 2^-24, exact in float
      const float value = static_cast<float>(magnitude) * 0x1p-24f;
      std::memcpy(&bits, &value, sizeof(bits));
      bits |= sign;
    }
  }
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline uint16_t narrow(float x, DType type) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (type == DType::kBFloat16) {
    if (x != x) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to inf: >= 65520
  if (magnitude < 0x38800000u) {                        // subnormal in half: round(|x| * 2^24)
    float value;
    std::memcpy(&value, &magnitude, sizeof(value));
    return sign | static_cast<uint16_t>(std::nearbyint(value * 0x1p24f));
  }
  return sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}
inline Vec widen(Half half, DType type) {
  return map([&](int i) { return widen(half.v[i], type); });
}
inline Half narrow(Vec a, DType type) {
  Half r;
  for (int i = 0; i < kWidth; ++i) r.v[i] = narrow(a.v[i], type);
  return r;
}
inline Half load_half(const uint16_t* p) {
  Half r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline Half load_half(const uint16_t* p, int n) {
  Half r = {};
  std::memcpy(r.v, p, n * sizeof(uint16_t));
  return r;
}
inline void store_half(uint16_t* p, Half a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline void store_half(uint16_t* p, Half a, int n) { std::memcpy(p, a.v, n * sizeof(uint16_t)); }

#endif

// Elements in memory. A kernel is a template over one of these three.
struct F32 {
  using type = float;
  static constexpr DType dtype = DType::kFloat32;
};
struct BF16 {
  using type = uint16_t;
  static constexpr DType dtype = DType::kBFloat16;
};
struct F16 {
  using type = uint16_t;
  static constexpr DType dtype = DType::kFloat16;
};

template <typename E>
inline Vec load_as(const typename E::type* p) {
  if constexpr (std::is_same_v<E, F32>) return load(p);
  else return widen(load_half(p), E::dtype);
}
template <typename E>
inline Vec load_as(const typename E::type* p, int n) {
  if constexpr (std::is_same_v<E, F32>) return load(p, n);
  else return widen(load_half(p, n), E::dtype);
}
template <typename E>
inline void store_as(typename E::type* p, Vec a) {
  if constexpr (std::is_same_v<E, F32>) store(p, a);
  else store_half(p, narrow(a, E::dtype));
}
template <typename E>
inline void store_as(typename E::type* p, Vec a, int n) {
  if constexpr (std::is_same_v<E, F32>) store(p, a, n);
  else store_half(p, narrow(a, E::dtype), n);
}

// Lanes of the vector that starts at i of a row of `size` elements.
inline int lanes_at(int64_t i, int64_t size) { return static_cast<int>(std::min<int64_t>(kWidth, size - i)); }

// 2^t for attention weights (t <= 0). AVX-512 takes floor and rest in one instruction each, so its polynomial lives on
// [0, 1); the others round, and theirs lives on [-1/2, 1/2]. Relative minimax polynomials: degree 4 is off by 2.6e-6,
// far below the 2e-3 of a bfloat16 result; degree 6 by 1.9e-9, below float's own round-off.
template <bool kBFloat16Result>
inline Vec exp2(Vec t) {
#if defined(SAIT_VEC_AVX512)
  const Vec r = {_mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  constexpr float kDegree4[] = {1.0000026226f, 0.6930038333f, 0.2414427549f, 0.0520114638f, 0.0135341678f};
  constexpr float kDegree6[] = {1.f,           0.6931470037f, 0.2402298301f, 0.0554833412f,
                                0.0096788406f, 0.0012439688f, 0.0002170225f};
#else
  const Vec k = round_to_nearest(max(set(-200.f), t));  // in this order a NaN stays a NaN
  const Vec r = max(set(-200.f), t) - k;
  constexpr float kDegree4[] = {0.9999992847f, 0.6931217909f, 0.2402474433f, 0.0559178628f, 0.0095701021f};
  constexpr float kDegree6[] = {1.f,           0.6931471825f, 0.2402264625f, 0.0555032864f,
                                0.0096184891f, 0.0013399931f, 0.0001534581f};
#endif
  Vec p;
  if constexpr (kBFloat16Result) {
    p = set(kDegree4[4]);
    for (int i = 3; i >= 0; --i) p = fma(p, r, set(kDegree4[i]));
  } else {
    p = set(kDegree6[6]);
    for (int i = 5; i >= 0; --i) p = fma(p, r, set(kDegree6[i]));
  }
#if defined(SAIT_VEC_AVX512)
  return {_mm512_scalef_ps(p.v, t.v)};  // scalef takes floor(t) itself
#else
  return scale_by_power(p, k);
#endif
}

// 1 / a, off by at most 2^-14 of its value.
inline Vec approximate_reciprocal(Vec a) {
#if defined(SAIT_VEC_AVX512)
  return {_mm512_rcp14_ps(a.v)};
#else
  return set(1.f) / a;
#endif
}

// 1 / a to a rounding or two: on AVX-512 by a step of Newton's, since divisions are slow.
inline Vec reciprocal(Vec a) {
#if defined(SAIT_VEC_AVX512)
  const Vec r = approximate_reciprocal(a);
  return r * (set(2.f) - a * r);
#else
  return set(1.f) / a;
#endif
}

// visit(E{}) with the element type of `dtype`.
template <typename Visitor>
inline void visit_dtype(DType dtype, Visitor&& visitor) {
  if (dtype == DType::kFloat32) visitor(F32{});
  else if (dtype == DType::kBFloat16) visitor(BF16{});
  else visitor(F16{});
}

}  // namespace sait::cpu::SAIT_ISA
