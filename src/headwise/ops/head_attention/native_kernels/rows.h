// What both passes share: rows and their lists, packed operands, products, threads.
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

constexpr int64_t ROWS = 64;  // of a block
constexpr int64_t KEYS = 256;  // of a step
// Products compile for each size that they see; multiples keep those few.
constexpr int64_t ROW_MULTIPLE = 32, KEY_MULTIPLE = 64;
constexpr float LOG2E = 1.4426950408889634f;

// Uninitialised, unlike a vector: kernels write before they read.
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

// 2^x for x <= 0, by a series that vectorises: within roundings, where halves follow within 3e-6.
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

// The same for the transpose of `in` [count, channels]: B [channels, columns]. A transposition of
// words of 32 bits, be they a float or a pair of halves.
template <typename T>
void pack_transposed(
    T* out, const T* in, int64_t stride, int64_t count, int64_t columns, int64_t channels) {
  constexpr int64_t each = HALF<T> ? 2 : 1;
  auto* words = reinterpret_cast<uint32_t*>(out);
  for (int64_t j0 = 0; j0 < channels / each; j0 += 16)
    for (int64_t i = 0; i < columns; ++i) {
      const auto* row = reinterpret_cast<const uint32_t*>(in + i * stride);
      for (int64_t j = j0; j < std::min(j0 + 16, channels / each); ++j)
        words[j * columns + i] = i < count ? row[j] : 0;
    }
}

template <typename T>
void multiply(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
  brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, HALF<T>);
}

struct Sizes {
  int64_t batch, queries, heads, channels, keys, key_heads, group, offset;
  bool causal;

  Sizes(const Tensor& q, const Tensor& k, bool causal)
      : batch(q.size(0)), queries(q.size(1)), heads(q.size(2)), channels(q.size(3)),
        keys(k.size(1)), key_heads(k.size(2)), group(heads / key_heads), offset(keys - queries),
        causal(causal) {}

  int64_t lists() const { return batch * key_heads; }
  int64_t steps() const { return (keys + KEYS - 1) / KEYS; }
  // The last key that a row sees.
  int64_t limit(int32_t row) const { return causal ? row / group + offset : keys - 1; }
  // Where a row of a list stands in [B, T, H].
  int64_t place(int64_t list, int32_t row) const {
    return (list / key_heads * queries + row / group) * heads + list % key_heads * group +
        row % group;
  }
};

inline std::vector<std::vector<int32_t>> rows_that_are_on(const Sizes& z, const float* gates) {
  std::vector<std::vector<int32_t>> lists(z.lists());
  at::parallel_for(0, z.lists(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list)
      for (int32_t row = 0; row < z.queries * z.group; ++row)
        if (gates[z.place(list, row)] != 0 && z.limit(row) >= 0) lists[list].push_back(row);
  });
  return lists;
}

// Calls work(i) for every i below count; threads take the next one when they are done.
template <typename Work>
void share_out(int64_t count, const Work& make_worker) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    auto work = make_worker();
    for (int64_t i; (i = next++) < count;) work(i);
    at::native::cpublas::brgemm_release();
  });
}

// Keys or values [B, S, Hkv, C] of one list.
template <typename T>
const T* of_list(const Tensor& x, const Sizes& z, int64_t list) {
  return x.const_data_ptr<T>() + list / z.key_heads * x.stride(0) + list % z.key_heads * x.stride(2);
}

}  // namespace headwise
