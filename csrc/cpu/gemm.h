// GEMMs and packing for the CPU kernels. Included once per instruction set, after vec.h.
//
// A GEMM is cut into tiles that stay in registers: 6 rows by 4 vectors are 24 sums, enough to hide the latency of a
// multiply-add, and each step of a tile loads 10 operands for 24 multiply-adds. Nothing is compiled at run time,
// whatever the sizes.
namespace sait::cpu::SAIT_ISA {

#if defined(SAIT_VEC_AVX512)
constexpr int kTileRows = 6, kTileVecs = 4;
#else
constexpr int kTileRows = 6, kTileVecs = 2;  // of 16 registers
#endif

template <int n>
using Int = std::integral_constant<int, n>;

inline int64_t round_up(int64_t n, int64_t align) { return (n + align - 1) / align * align; }

// A per-thread buffer that only grows: kernels ask for it once per image and head.
template <typename T, int kSlot>
inline T* scratch(int64_t size) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// What a GEMM of type P takes in one step: one element of a row of A, and the row of B that belongs to it. For bfloat16
// two of each, summed in float; there two rows of B lie in pairs (VNNI order): element (k, n) at
// k / 2 * ldb + 2 * n + k % 2.
template <typename P>
struct Step {
  static constexpr int64_t kInputs = 1;
  using Operand = Vec;
  static Operand spread(const float* a) { return set(*a); }
  static Operand vector(const float* b) { return load(b); }
  static Operand vector(const float* b, int n) { return load(b, n); }
  static Vec multiply_add(Operand a, Operand b, Vec c) { return fma(a, b, c); }
};

#if defined(SAIT_VEC_AVX512_BF16)
template <>
struct Step<BF16> {
  static constexpr int64_t kInputs = 2;
  using Operand = __m512i;
  static Operand spread(const uint16_t* a) {
    int pair;
    std::memcpy(&pair, a, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Operand vector(const uint16_t* b) { return _mm512_loadu_si512(b); }
  static Operand vector(const uint16_t* b, int n) { return _mm512_maskz_loadu_epi32(lanes(n), b); }
  static Vec multiply_add(Operand a, Operand b, Vec c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
};
#endif

// What a GEMM prefetches on the way, a little with each step: the operands of the next one, from the outer caches or
// from memory. A loop of its own for that would cost the time that the loop takes.
struct Ahead {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes from one step to the next

  // Part number `share` of `shares` equal parts of the `bytes` from `from` on, spread over a GEMM of `steps` steps.
  static Ahead share_of(const void* from, int64_t bytes, int64_t share, int64_t shares, int64_t steps) {
    const int64_t begin = bytes * share / shares, end = bytes * (share + 1) / shares;
    return {static_cast<const char*>(from) + begin, (end - begin + steps - 1) / steps};
  }
};

// C (R, V vectors) = A B in `steps` steps, += when accumulate; with kTail only `tail` lanes of the last vector. The
// steps are summed on their own before they are added to C, so that a long sum taken in parts is more exact.
template <typename P, int R, int V, bool kTail>
[[gnu::noinline]] void tile_gemm(int64_t steps, const typename P::type* A, int64_t lda, const typename P::type* B,
                                 int64_t ldb, float* C, int64_t ldc, bool accumulate, int tail, Ahead ahead) {
  using S = Step<P>;
  Vec c[R][V];
#pragma GCC unroll 8  // on every loop over the tile, or the sums lie in memory before and after the loop over k
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) c[i][j] = set(0.f);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const auto* row = B + k * ldb;
    __builtin_prefetch(ahead.data + k * ahead.stride, 0, 2);
    typename S::Operand b[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      const auto* p = row + j * kWidth * S::kInputs;
      b[j] = kTail && j == V - 1 ? S::vector(p, tail) : S::vector(p);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const auto a = S::spread(A + i * lda + k * S::kInputs);
#pragma GCC unroll 8
      for (int j = 0; j < V; ++j) c[i][j] = S::multiply_add(a, b[j], c[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) {
      float* p = C + i * ldc + j * kWidth;
      if (kTail && j == V - 1) store(p, accumulate ? load(p, tail) + c[i][j] : c[i][j], tail);
      else store(p, accumulate ? load(p) + c[i][j] : c[i][j]);
    }
  }
}

// Tiles of V vectors for all rows: kTileRows at a time, then those that are left.
template <typename P, int V, bool kTail>
void column_of_tiles(int64_t M, int64_t steps, const typename P::type* A, int64_t lda, const typename P::type* B,
                     int64_t ldb, float* C, int64_t ldc, bool accumulate, int tail, Ahead ahead = {}) {
  if (ahead.data == nullptr) ahead.data = reinterpret_cast<const char*>(B);  // stride 0: a line that is in the cache
  const auto tile = [&](auto rows, int64_t i) {
    tile_gemm<P, rows, V, kTail>(steps, A + i * lda, lda, B, ldb, C + i * ldc, ldc, accumulate, tail, ahead);
  };
  int64_t i = 0;
  for (; i + kTileRows <= M; i += kTileRows) tile(Int<kTileRows>{}, i);
  static_assert(kTileRows == 6);
  switch (M - i) {
    case 5: return tile(Int<5>{}, i);
    case 4: return tile(Int<4>{}, i);
    case 3: return tile(Int<3>{}, i);
    case 2: return tile(Int<2>{}, i);
    case 1: return tile(Int<1>{}, i);
  }
}

// In float a sum is taken in parts: its error grows with its length, and torch sums in parts, too. With bfloat16 inputs
// their own rounding is far larger than that error.
constexpr int64_t kMaxSum = 256;
template <typename P>
constexpr int64_t parts_of_sum(int64_t K) {
  return Step<P>::kInputs == 1 ? std::max<int64_t>(1, (K + kMaxSum - 1) / kMaxSum) : 1;
}

// C (M, N) = A (M, K) B (K, N), += when accumulate. Row-major; lda and ldc in elements, ldb those of a step of B. Of
// bfloat16 K is even.
template <typename P>
void gemm(int64_t M, int64_t N, int64_t K, const typename P::type* A, int64_t lda, const typename P::type* B,
          int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  constexpr int64_t kInputs = Step<P>::kInputs;
  const int64_t parts = parts_of_sum<P>(K);
  const int64_t steps = K / kInputs, whole = N / kWidth * kWidth;
  for (int64_t part = 0; part < parts; ++part, accumulate = true) {
    const int64_t first = steps * part / parts, count = steps * (part + 1) / parts - first;
    int64_t j = 0;
    const auto tiles = [&](auto vectors, auto tail, int lanes) {
      column_of_tiles<P, vectors, tail>(M, count, A + first * kInputs, lda, B + first * ldb + j * kInputs, ldb, C + j,
                                        ldc, accumulate, lanes);
      j += vectors * kWidth;
    };
    while (j + kTileVecs * kWidth <= whole) tiles(Int<kTileVecs>{}, std::false_type{}, 0);
    static_assert(kTileVecs == 2 || kTileVecs == 4);
    if (whole - j == 3 * kWidth) tiles(Int<std::min(3, kTileVecs)>{}, std::false_type{}, 0);
    if (whole - j == 2 * kWidth) tiles(Int<2>{}, std::false_type{}, 0);
    if (whole - j == kWidth) tiles(Int<1>{}, std::false_type{}, 0);
    if (j < N) tiles(Int<1>{}, std::true_type{}, lanes_at(j, N));
  }
}

#if defined(SAIT_VEC_AVX512)
// In place: 16 x 16 dwords, row i in r[i] -> column i in r[i].
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// out (columns, ldo) = in (rows, ldi)^T in dwords; rows past `rows` up to `padded` (a multiple of 16) come out as 0.
inline void transpose_dwords(const uint32_t* in, int64_t ldi, int64_t rows, int64_t padded, int64_t columns,
                             uint32_t* out, int64_t ldo) {
  for (int64_t j = 0; j < padded; j += 16) {
    const int64_t live = std::clamp<int64_t>(rows - j, 0, 16);
    for (int64_t c = 0; c < columns; c += 16) {
      const int n = static_cast<int>(std::min<int64_t>(16, columns - c));
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = i < live ? _mm512_maskz_loadu_epi32(lanes(n), in + (j + i) * ldi + c) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int i = 0; i < n; ++i) _mm512_storeu_si512(out + (c + i) * ldo + j, r[i]);
    }
  }
}
#endif

// out (columns, ldo) = in (rows, ldi)^T; rows past `rows` up to `padded` (a multiple of 16) come out as zeros.
inline void transpose_f32(const float* in, int64_t ldi, int64_t rows, int64_t padded, int64_t columns, float* out,
                          int64_t ldo) {
#if defined(SAIT_VEC_AVX512)
  transpose_dwords(reinterpret_cast<const uint32_t*>(in), ldi, rows, padded, columns, reinterpret_cast<uint32_t*>(out),
                   ldo);
#else
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t j = 0; j < rows; ++j) out[c * ldo + j] = in[j * ldi + c];
    std::fill(out + c * ldo + rows, out + c * ldo + padded, 0.f);
  }
#endif
}

// Rows of one head as contiguous float (count, D), times `factor`: rows indices[0..count) - offset, or 0..count.
template <typename E>
inline void pack_rows_f32(const typename E::type* head, int64_t row_stride, const int32_t* indices, int64_t offset,
                          int64_t count, int64_t padded, int64_t D, float factor, float* out) {
  const Vec f = set(factor);
  for (int64_t i = 0; i < count; ++i) {
    const typename E::type* row = head + (indices ? indices[i] - offset : i) * row_stride;
    for (int64_t d = 0; d < D; d += kWidth) {
      const int n = lanes_at(d, D);
      store(out + i * D + d, load_as<E>(row + d, n) * f, n);
    }
  }
  std::fill(out + count * D, out + padded * D, 0.f);
}

}  // namespace sait::cpu::SAIT_ISA
