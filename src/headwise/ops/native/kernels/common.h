// What all kernels share: packed operands, products, threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

namespace headwise {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

// oneDNN compiles a product for each size that it sees; multiples keep the sizes few.
constexpr int64_t ROW_MULTIPLE = 32;
constexpr float LOG2E = 1.4426950408889634f;

// Memory without values, unlike a vector's: kernels write before they read.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> values;
  explicit Buffer(int64_t size) : values(new T[size]) {}
  T* data() { return values.get(); }
  T& operator[](int64_t i) { return values[i]; }
};

template <typename T>
constexpr bool HALF = std::is_same_v<T, BFloat16>;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 2^x for x <= 0, by a series that vectorises: exact but for roundings, or within 3e-6 where the
// result becomes a bfloat16.
template <typename T>
inline float exp2_of(float x) {
  x = x < -126.0f ? -126.0f : x;
  const float whole = std::nearbyintf(x), f = x - whole;
  // ln(2)^n / n! from n = 7 or 5 down.
  float p = HALF<T> ? 0.0f : 1.5252733804e-5f * f + 1.5403530393e-4f;
  p = p * f + 1.3333558146e-3f;
  p = p * f + 9.6181291076e-3f;
  p = p * f + 5.5504108665e-2f;
  p = p * f + 2.4022650696e-1f;
  p = p * f + 6.9314718056e-1f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline uint16_t nearest_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
void store(T* out, const float* in, int64_t n) {
  if constexpr (HALF<T>) {
    auto* half = reinterpret_cast<uint16_t*>(out);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) half[i] = nearest_bf16(in[i]);
  } else {
    std::memcpy(out, in, n * sizeof(float));
  }
}

// The second operand of a product, B [rows, columns]. bfloat16 hardware wants pairs of rows
// interleaved, [rows / 2][columns][2]; float32 is taken as it is. Rows from `count` on are 0.
template <typename T>
void pack(T* out, const T* in, int64_t stride, int64_t count, int64_t rows, int64_t columns) {
  if constexpr (HALF<T>) {
    auto* pairs = reinterpret_cast<uint16_t*>(out);
    const auto* source = reinterpret_cast<const uint16_t*>(in);
    for (int64_t i = 0; i < rows; i += 2)
      for (int64_t j = 0; j < columns; ++j) {
        pairs[i * columns + 2 * j] = i < count ? source[i * stride + j] : 0;
        pairs[i * columns + 2 * j + 1] = i + 1 < count ? source[(i + 1) * stride + j] : 0;
      }
  } else {
    for (int64_t i = 0; i < rows; ++i)
      if (i < count)
        std::memcpy(out + i * columns, in + i * stride, columns * sizeof(T));
      else
        std::memset(out + i * columns, 0, columns * sizeof(T));
  }
}

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
// Words of 32 bits: a float, or a pair of bfloat16.
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

// Exchanges entries (i, j) and (j, i) where i and j differ in this bit; all bits in turn transpose a
// square.
template <int BIT>
inline void exchange(Words (&rows)[LANES]) {
  Words first, second;
  for (int i = 0; i < LANES; ++i) {
    first[i] = i & BIT ? LANES + i - BIT : i;
    second[i] = i & BIT ? LANES + i : i + BIT;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & BIT)) {
      const Words a = rows[i], b = rows[i + BIT];
      rows[i] = __builtin_shuffle(a, b, first), rows[i + BIT] = __builtin_shuffle(a, b, second);
    }
}

inline void transpose_square(Words (&rows)[LANES]) {
  if constexpr (LANES == 16) exchange<LANES / 2>(rows);
  exchange<4>(rows), exchange<2>(rows), exchange<1>(rows);
}

// Copies a row of a square: LANES words, or fewer where the matrix ends.
inline void copy_words(void* out, const void* in, int64_t words) {
  if (words >= LANES)
    std::memcpy(out, in, sizeof(Words));
  else
    std::memcpy(out, in, words * sizeof(uint32_t));
}

// out[j][i] = row_of(i)[j] for j < words, and 0 for i from `count` to `columns`.
template <typename RowOf>
void transpose_words(
    uint32_t* out, int64_t out_stride, const RowOf& row_of, int64_t count, int64_t columns,
    int64_t words) {
  Words square[LANES];
  for (int64_t i = 0; i < columns; i += LANES)
    for (int64_t j = 0; j < words; j += LANES) {
      for (int64_t r = 0; r < LANES; ++r) {
        square[r] = Words{};
        if (i + r < count) copy_words(&square[r], row_of(i + r) + j, words - j);
      }
      transpose_square(square);
      for (int64_t r = 0; r < std::min<int64_t>(LANES, words - j); ++r)
        copy_words(out + (j + r) * out_stride + i, &square[r], columns - i);
    }
}

// The same operand for the transpose of `count` rows [channels]: B [channels, columns]. Row i starts
// at row_of(i).
template <typename T, typename RowOf>
void pack_transposed(
    T* out, const RowOf& row_of, int64_t count, int64_t columns, int64_t channels) {
  transpose_words(
      reinterpret_cast<uint32_t*>(out), columns,
      [&](int64_t i) { return reinterpret_cast<const uint32_t*>(row_of(i)); }, count, columns,
      channels * sizeof(T) / sizeof(uint32_t));
}

template <typename T>
void multiply(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, HALF<T>);
}

// Calls work(i) for every i below count, where work = make_worker() is a thread's own. A thread that
// is done asks for the next i.
template <typename Work>
void share_out(int64_t count, const Work& make_worker) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    auto work = make_worker();
    for (int64_t i; (i = next++) < count;) work(i);
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace headwise
