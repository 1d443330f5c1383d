// Matrix products and packing for the CPU kernels. Included once per instruction set, after vec.h.
//
// From AVX-512 on the products are oneDNN's brgemm, which compiles a kernel per shape and thread: pad the sizes that
// vary with the data (kKeyAlign for a number of keys, kRowAlign for a number of rows) so that there are few shapes.
// Elsewhere, and where oneDNN is switched off, a register-tiled loop does the same.
namespace sait::cpu::SAIT_ISA {

constexpr int64_t kKeyAlign = 16;
constexpr int64_t kRowAlign = 4;

inline int64_t round_up(int64_t n, int64_t align) { return (n + align - 1) / align * align; }

// Numbers of keys are padded to 16, from 1,024 on to 128: at most 64 shapes up to there, and few beyond.
inline int64_t padded_keys(int64_t n) { return round_up(n, n <= 1024 ? kKeyAlign : 128); }

// A per-thread buffer that only grows: kernels ask for it once per image and head.
template <typename T, int kSlot>
inline T* scratch(int64_t size) {
  static thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// R rows x 2 vectors of C: A (R, K) B (K, 2 vectors). What is added to C is summed first, as brgemm does it, so that a
// long sum in parts is the more exact one. `tail` is the number of columns in this tile.
template <int R>
inline void gemm_tile(int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb, float* C, int64_t ldc,
                      bool accumulate, int64_t columns) {
  const int n0 = lanes_at(0, columns), n1 = columns > kWidth ? lanes_at(kWidth, columns) : 0;
  Vec c[R][2];
  for (int i = 0; i < R; ++i) c[i][0] = c[i][1] = set(0.f);
  for (int64_t k = 0; k < K; ++k) {
    const float* row = B + k * ldb;
    const Vec b0 = n0 == kWidth ? load(row) : load(row, n0);
    const Vec b1 = n1 == kWidth ? load(row + kWidth) : n1 > 0 ? load(row + kWidth, n1) : set(0.f);
    for (int i = 0; i < R; ++i) {
      const Vec a = set(A[i * lda + k]);
      c[i][0] = fma(a, b0, c[i][0]);
      c[i][1] = fma(a, b1, c[i][1]);
    }
  }
  for (int i = 0; i < R; ++i) {
    float* row = C + i * ldc;
    store(row, accumulate ? load(row, n0) + c[i][0] : c[i][0], n0);
    if (n1 > 0) store(row + kWidth, accumulate ? load(row + kWidth, n1) + c[i][1] : c[i][1], n1);
  }
}

// C (M, N) = A (M, K) B (K, N), += when accumulate. Row-major, leading dimensions in elements.
inline void gemm_f32(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
                     float* C, int64_t ldc, bool accumulate) {
#if defined(SAIT_VEC_AVX512)
  if (has_brgemm_f32()) return brgemm_f32(M, N, K, A, lda, B, ldb, C, ldc, accumulate);
#endif
  constexpr int kRows = 4;
  for (int64_t j = 0; j < N; j += 2 * kWidth) {
    const int64_t columns = std::min<int64_t>(2 * kWidth, N - j);
    int64_t i = 0;
    for (; i + kRows <= M; i += kRows) {
      gemm_tile<kRows>(K, A + i * lda, lda, B + j, ldb, C + i * ldc + j, ldc, accumulate, columns);
    }
    for (; i < M; ++i) gemm_tile<1>(K, A + i * lda, lda, B + j, ldb, C + i * ldc + j, ldc, accumulate, columns);
  }
}

// Once per thread and parallel range that used a product.
inline void release_gemm() {
#if defined(SAIT_VEC_AVX512)
  if (has_brgemm_f32()) brgemm_release();
#endif
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
