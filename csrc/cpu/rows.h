// Walks along a row of any length by vectors. Included once per instruction set, after cpu/vec.h; no include guard.
namespace sait::cpu::SAIT_ISA {

// The first n lanes; a whole vector, which every instruction set loads fastest, where n is the constant kWidth.
template <typename E>
inline Vec load_lanes(const typename E::type* p, int n) {
  return n == kWidth ? load_as<E>(p) : load_as<E>(p, n);
}
template <typename E>
inline void store_lanes(typename E::type* p, Vec a, int n) {
  if (n == kWidth) store_as<E>(p, a);
  else store_as<E>(p, a, n);
}

// body(i, n) for each vector of a row: n lanes from element i.
template <typename Body>
inline void for_each_vec(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(i, kWidth);
  if (i < size) body(i, lanes_at(i, size));
}

// The sum of body(i, n) over a row; lanes past n must be zero. Two sums in turn: each addition waits for its last.
template <typename Body>
inline float sum_over(int64_t size, Body body) {
  Vec even = set(0.f), odd = set(0.f);
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
    even = even + body(i, kWidth);
    odd = odd + body(i + kWidth, kWidth);
  }
  for (; i < size; i += kWidth) even = even + body(i, lanes_at(i, size));
  return sum(even + odd);
}

struct Moments {
  float mean, rstd;
};

// From the sum of a row. The variance takes a second pass: E[r^2] - E[r]^2 would cancel where the mean is large.
template <typename E>
inline Moments moments(const typename E::type* row, float sum, int64_t channels, float eps) {
  const float count = static_cast<float>(channels), mean = sum / count;
  const float squares = sum_over(channels, [=](int64_t i, int n) {
    const Vec centred = first(load_lanes<E>(row + i, n) - set(mean), n, 0.f);
    return centred * centred;
  });
  return {mean, 1.f / std::sqrt(squares / count + eps)};
}

// The sums of kWidth vectors, one per lane. Each level adds the halves of two vectors side by side: 45 operations for
// 16 sums, where one after the other takes 128.
#if defined(SAIT_VEC_AVX512)
inline __m512 add_pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
inline __m512 add_quads(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
inline Vec sums(const Vec* a) {
  __m512 quads[4];  // lane 4 i + r holds row r's sum over the lanes 4 i .. 4 i + 3
  for (int i = 0; i < 4; ++i) {
    quads[i] = add_quads(add_pairs(a[4 * i].v, a[4 * i + 1].v), add_pairs(a[4 * i + 2].v, a[4 * i + 3].v));
  }
  __m512 halves[2];
  for (int i = 0; i < 2; ++i) {
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x44),
                              _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xee));
  }
  return {_mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                        _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd))};
}
#elif defined(SAIT_VEC_AVX2)
inline Vec sums(const Vec* a) {
  __m256 quads[2];
  for (int i = 0; i < 2; ++i) {
    quads[i] =
        _mm256_hadd_ps(_mm256_hadd_ps(a[4 * i].v, a[4 * i + 1].v), _mm256_hadd_ps(a[4 * i + 2].v, a[4 * i + 3].v));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                        _mm256_permute2f128_ps(quads[0], quads[1], 0x31))};
}
#else
inline Vec sums(const Vec* a) {
  return map([&](int i) { return sum(a[i]); });
}
#endif

}  // namespace sait::cpu::SAIT_ISA
