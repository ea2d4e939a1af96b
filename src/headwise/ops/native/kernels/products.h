// Products of small matrices whose operands are in the caches: a tile of the result in registers.
//
// C [m, n] = A [m, k] times B [k, n], or C += that. float32, or products of bfloat16 summed in
// float32; k is even there, and B stands in pairs of rows, [k / 2][n][2] (pack() in common.h), so
// that in either type a step is a word of 32 bits of A, a row of words of B.
//
// Processors with matrix tiles (AMX) multiply bfloat16 by torch's own product, where torch has it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace at::native::cpublas {
// No part of torch's stable interface: a torch without them leaves them null.
[[gnu::weak]] void brgemm(
    int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
    const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool pairs);
[[gnu::weak]] void brgemm_release(bool pairs);
}  // namespace at::native::cpublas

namespace headwise {

using c10::BFloat16;

template <typename T>
constexpr bool HALF = std::is_same_v<T, BFloat16>;

#ifdef __AVX512F__
constexpr int LANES = 16, TILE_ROWS = 8, TILE_VECTORS = 2;  // 16 of 32 registers hold sums
#else
constexpr int LANES = 8, TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 of 16
#endif
// Words of 32 bits: a float, or a pair of bfloat16.
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Whole __attribute__((vector_size(4 * LANES)));

#if defined(__AVX2__) && !defined(__AVX512F__)
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(
      _mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` words; memory behind them is not touched, and the other lanes are 0.
inline Words load_some(const void* from, int64_t count) {
#if defined(__AVX512F__)
  return (Words)_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), from);
#elif defined(__AVX2__)
  return (Words)_mm256_maskload_epi32(static_cast<const int*>(from), first_lanes(count));
#else
  Words words{};
  std::memcpy(&words, from, 4 * count);
  return words;
#endif
}

inline void store_some(void* out, const Words& words, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1u << count) - 1), (__m512i)words);
#elif defined(__AVX2__)
  _mm256_maskstore_epi32(static_cast<int*>(out), first_lanes(count), (__m256i)words);
#else
  std::memcpy(out, &words, 4 * count);
#endif
}

inline Words load(const void* from) {
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

inline void store(void* out, const Words& words) { std::memcpy(out, &words, sizeof words); }

template <typename T>
inline Floats add_product(Floats sums, const uint32_t* from, Words b) {
  uint32_t a;
  std::memcpy(&a, from, sizeof a);  // which may start at any bfloat16
  if constexpr (HALF<T>) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps(
        (__m512)sums, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
#else
    // A bfloat16 is the upper half of a float.
    const Words both = Words{} + a;
    sums += (Floats)(both << 16) * (Floats)(b << 16);
    return sums + (Floats)(both & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
  } else {
    float factor;
    std::memcpy(&factor, &a, sizeof factor);
    return sums + factor * (Floats)b;
  }
}

// ROWS × VECTORS vectors of C; PART: of the only vector, its first `width` entries. STREAMED: A comes
// from memory, which gives twice as much to a core that asks for the rows after these, too.
template <typename T, int ROWS, int VECTORS, bool PART, bool STREAMED>
void product_tile(
    int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
    int64_t ldc, bool add, int64_t width) {
  const auto get = [=](const void* from) { return PART ? load_some(from, width) : load(from); };
  Floats sums[ROWS][VECTORS] = {};
  for (int64_t s = 0; s < steps; ++s) {
    if (STREAMED && s % LANES == 0)
      for (int i = 0; i < ROWS; ++i) __builtin_prefetch(a + (i + ROWS) * lda + s);
    Words row[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) row[v] = get(b + s * ldb + v * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v)
        sums[i][v] = add_product<T>(sums[i][v], a + i * lda + s, row[v]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* out = c + i * ldc + v * LANES;
      // At last: a sum of sums rounds less than one long sum.
      if (add) sums[i][v] += (Floats)get(out);
      if constexpr (PART)
        store_some(out, (Words)sums[i][v], width);
      else
        store(out, (Words)sums[i][v]);
    }
}

// All rows of VECTORS vectors of columns: tiles of TILE_ROWS, then one of what is left.
template <typename T, int VECTORS, bool PART, bool STREAMED, int ROWS = TILE_ROWS>
void product_columns(
    int64_t m, int64_t steps, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb,
    float* c, int64_t ldc, bool add, int64_t width) {
  for (; m >= ROWS; m -= ROWS, a += ROWS * lda, c += ROWS * ldc)
    product_tile<T, ROWS, VECTORS, PART, STREAMED>(steps, a, lda, b, ldb, c, ldc, add, width);
  if constexpr (ROWS > 1)
    if (m > 0)
      product_columns<T, VECTORS, PART, STREAMED, ROWS - 1>(
          m, steps, a, lda, b, ldb, c, ldc, add, width);
}

inline bool has_matrix_tiles() {
#ifdef __AVX512BF16__
  static const bool has = __builtin_cpu_supports("amx-bf16") && at::native::cpublas::brgemm &&
      at::native::cpublas::brgemm_release;
  return has;
#else
  return false;
#endif
}

constexpr int64_t SUMMED = 128;  // products of float32 in a row: sums of sums round less

template <bool STREAMED = false, typename T>
void multiply(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  if constexpr (HALF<T>) {
    // torch compiles a product for each number of rows that it sees; multiples keep them few.
    const int64_t rows = has_matrix_tiles() ? m / 32 * 32 : 0;
    if (rows) at::native::cpublas::brgemm(rows, n, k, lda, ldb, ldc, add, a, b, c, true);
    m -= rows, a += rows * lda, c += rows * ldc;
  } else if (k > SUMMED) {
    for (int64_t first = 0; first < k; first += SUMMED)
      multiply<STREAMED>(
          m, n, std::min(SUMMED, k - first), a + first, lda, b + first * ldb, ldb, c, ldc,
          add || first > 0);
    return;
  }
  const auto of_words = [](const T* x) { return reinterpret_cast<const uint32_t*>(x); };
  constexpr int64_t IN_A_WORD = sizeof(uint32_t) / sizeof(T), STEP = TILE_VECTORS * LANES;
  const int64_t steps = k / IN_A_WORD, row = lda / IN_A_WORD;
  const uint32_t *rows = of_words(a), *columns = of_words(b);
  for (; n >= STEP; n -= STEP, columns += STEP, c += STEP)
    product_columns<T, TILE_VECTORS, false, STREAMED>(
        m, steps, rows, row, columns, ldb, c, ldc, add, LANES);
  for (; n >= LANES; n -= LANES, columns += LANES, c += LANES)
    product_columns<T, 1, false, STREAMED>(
        m, steps, rows, row, columns, ldb, c, ldc, add, LANES);
  if (n > 0)
    product_columns<T, 1, true, STREAMED>(m, steps, rows, row, columns, ldb, c, ldc, add, n);
}

// At the end of a thread's part of the work.
inline void release_matrix_tiles() {
  if (has_matrix_tiles()) at::native::cpublas::brgemm_release(true);
}

}  // namespace headwise
