// What all kernels share: packed operands, products, threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "products.h"

namespace headwise {

using torch::headeronly::ScalarType;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr float LOG2E = 1.4426950408889634f;

// Memory without values, unlike a vector's: kernels write before they read.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> values;
  explicit Buffer(int64_t size) : values(new T[size]) {}
  T* data() { return values.get(); }
  T& operator[](int64_t i) { return values[i]; }
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline float nearest_whole(float x) { return std::nearbyintf(x); }
inline Floats nearest_whole(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  for (int i = 0; i < LANES; ++i) x[i] = std::nearbyintf(x[i]);
  return x;
#endif
}

// x · 2^whole, for whole numbers from -127, which gives 0.
inline float times_power(float x, float whole) {
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x * power;
}
inline Floats times_power(Floats x, Floats whole) {
  return x * (Floats)((__builtin_convertvector(whole, Whole) + 127) << 23);
}

// 2^x of numbers or vectors up to 126, 0 for -infinity, by a series that vectorises: exact but for
// roundings, or within 8e-5 where the result becomes a bfloat16.
template <typename T, typename Number>
inline Number exp2_of(Number x) {
  // A NaN stays one: it is not below.
  x = x < -127.0f ? Number{} - 127.0f : x;
  const Number whole = nearest_whole(x), f = x - whole;
  Number p;
  if constexpr (HALF<T>) {
    // The cubic whose largest relative error on |f| <= 1/2 is least.
    p = 5.5171320e-2f * f + 2.4261054e-1f;
    p = p * f + 6.9326099e-1f;
    p = p * f + 9.9992811e-1f;
  } else {
    // ln(2)^n / n! from n = 7 down.
    p = 1.5252733804e-5f * f + 1.5403530393e-4f;
    p = p * f + 1.3333558146e-3f;
    p = p * f + 9.6181291076e-3f;
    p = p * f + 5.5504108665e-2f;
    p = p * f + 2.4022650696e-1f;
    p = p * f + 6.9314718056e-1f;
    p = p * f + 1.0f;
  }
  return times_power(p, whole);
}

inline float largest_of(Floats x) {
  float top = x[0];
  for (int i = 1; i < LANES; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

inline float sum_of(Floats x) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

inline uint16_t nearest_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A vector of results in T.
template <typename T>
inline void store_vector(T* out, Floats x) {
  if constexpr (HALF<T>) {
#ifdef __AVX512BF16__
    const auto half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(static_cast<void*>(out), &half, sizeof half);
#else
    const Words bits = (Words)x;
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    const Halves half =
        __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
    std::memcpy(static_cast<void*>(out), &half, sizeof half);
#endif
  } else {
    std::memcpy(out, &x, sizeof x);
  }
}

template <typename T>
void store(T* out, const float* in, int64_t n) {
  if constexpr (HALF<T>) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store_vector(out + i, (Floats)load(in + i));
    for (; i < n; ++i) out[i].x = nearest_bf16(in[i]);
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

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// Calls work(i) for every i below count, where work = make_worker() is a thread's own. A thread that
// is done asks for the next i.
template <typename Work>
void share_out(int64_t count, const Work& make_worker) {
  std::atomic<int64_t> next{0};
  parallel_for(0, num_threads(), 1, [&](int64_t, int64_t) {
    auto work = make_worker();
    for (int64_t i; (i = next++) < count;) work(i);
    release_matrix_tiles();
  });
}

}  // namespace headwise
