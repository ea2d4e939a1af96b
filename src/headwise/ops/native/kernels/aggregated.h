// What both passes of aggregated attention share: the weights of the rows that are on.
//
// A list is one head of one image. A row is a token that is on. Blocks of rows multiply with the
// pooled keys; the window is read row by row, from a map with a border of zeros. All scores of a row
// stand side by side, pooled ones first, so that one softmax goes over both.
//
// Sources: TransNeXt, arXiv 2311.17132; MoH, arXiv 2410.11842, Eq. 4.
#pragma once

#include "common.h"

namespace headwise {

constexpr int64_t MAP_ROWS = 64;  // of a block
constexpr int64_t MAP_MULTIPLE = 16;  // rows and columns are padded to multiples of it

struct Map {
  int64_t batch, tokens, heads, channels, pooled, height, width, side, near;
  int64_t border, wide, far_columns, near_columns, columns;
  std::vector<int64_t> steps;  // from the first position of a window to each of them
  std::vector<float> outside;  // -infinity where a token's position is outside, [tokens, near]

  Map(const Tensor& q, const Tensor& k_pool, int64_t height, int64_t width, int64_t side)
      : batch(q.size(0)), tokens(q.size(1)), heads(q.size(2)), channels(q.size(3)),
        pooled(k_pool.size(1)), height(height), width(width), side(side), near(side * side),
        border(side / 2), wide(width + 2 * border), far_columns(round_up(pooled, MAP_MULTIPLE)),
        near_columns(round_up(near, MAP_MULTIPLE)), columns(round_up(pooled + near, MAP_MULTIPLE)),
        outside(tokens * near) {
    for (int64_t w = 0; w < near; ++w) steps.push_back((w / side * wide + w % side) * channels);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t w = 0; w < near; ++w) {
        const int64_t y = t / width + w / side - border, x = t % width + w % side - border;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        outside[t * near + w] = inside ? 0 : -INFINITY;
      }
  }

  int64_t place(int64_t b, int64_t t, int64_t h) const { return (b * tokens + t) * heads + h; }
  int64_t bordered() const { return (height + 2 * border) * wide * channels; }
  int64_t of_rows() const { return MAP_ROWS * channels; }
  int64_t of_near() const { return near_columns * channels; }
  int64_t of_far() const { return far_columns * channels; }
  // Where a token's window starts in a bordered map, and where the token itself is.
  int64_t corner(int64_t t) const { return (t / width * wide + t % width) * channels; }
  int64_t middle(int64_t t) const { return corner(t) + (border * wide + border) * channels; }
};

// Biases are float32, whatever the rest; learned_tokens are [H, C, near_columns], 0 beyond near.
struct MapInputs {
  const Tensor &q, &k, &v, &k_pool, &v_pool, &gate, &local_bias, &pool_bias, &unit_q,
      &learned_tokens, &learned_bias;
};

template <typename T>
void widen(float* out, const T* in, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

// Reductions by hand: a compiler adds the lanes one by one, which is slower than all the rest.
typedef float Eight __attribute__((vector_size(32)));

inline Eight eight(const float* from) {
  Eight x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <typename Combine>
inline float fold(Eight x, const Combine& combine) {
  typedef int32_t Lanes __attribute__((vector_size(32)));
  x = combine(x, __builtin_shuffle(x, Lanes{4, 5, 6, 7, 0, 1, 2, 3}));
  x = combine(x, __builtin_shuffle(x, Lanes{2, 3, 0, 1, 6, 7, 4, 5}));
  x = combine(x, __builtin_shuffle(x, Lanes{1, 0, 3, 2, 5, 4, 7, 6}));
  return x[0];
}

inline float dot(const float* a, const float* b, int64_t n) {
  Eight sums{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) sums += eight(a + i) * eight(b + i);
  float rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return rest + fold(sums, [](Eight x, Eight y) { return x + y; });
}

// Of a multiple of eight.
inline float sum(const float* a, int64_t n) {
  Eight sums{};
  for (int64_t i = 0; i < n; i += 8) sums += eight(a + i);
  return fold(sums, [](Eight x, Eight y) { return x + y; });
}

inline float largest(const float* a, int64_t n) {
  const auto larger = [](Eight x, Eight y) { return x > y ? x : y; };
  Eight top = eight(a);
  for (int64_t i = 8; i < n; i += 8) top = larger(top, eight(a + i));
  return fold(top, larger);
}

inline void add_multiple(float* out, float factor, const float* in, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += factor * in[i];
}

// out [c] += the sum of factors[w] times what is at from + steps[w].
inline void add_multiples(
    float* out, const float* factors, const float* from, const std::vector<int64_t>& steps,
    int64_t c) {
  const int64_t n = steps.size();
  int64_t j = 0;
  for (; j + 8 <= c; j += 8) {
    Eight sums = eight(out + j);
    for (int64_t w = 0; w < n; ++w) sums += factors[w] * eight(from + steps[w] + j);
    std::memcpy(out + j, &sums, sizeof sums);
  }
  for (; j < c; ++j)
    for (int64_t w = 0; w < n; ++w) out[j] += factors[w] * from[steps[w] + j];
}

// One list at a time: its keys and values, and the weights of a block of its rows. CHANNELS is
// the number of channels where it is known at compile time, else 0.
template <typename T, int64_t CHANNELS>
struct MapList {
  const Map& z;
  const MapInputs& x;
  // Pointers for what is read row by row: asking the tensor each time would be slow.
  const T *q_of, *unit_q_of;
  const float *gates, *local_bias, *pool_bias, *learned_bias;
  int64_t b = 0, h = 0;
  std::vector<int32_t> rows;
  Buffer<float> keys, values, wide_q, weights, learned;
  Buffer<T> far_keys, far_values, learned_tokens, q, unit_q;

  MapList(const Map& z, const MapInputs& x)
      : z(z), x(x), q_of(x.q.const_data_ptr<T>()), unit_q_of(x.unit_q.const_data_ptr<T>()),
        gates(x.gate.const_data_ptr<float>()), local_bias(x.local_bias.const_data_ptr<float>()),
        pool_bias(x.pool_bias.const_data_ptr<float>()),
        learned_bias(x.learned_bias.const_data_ptr<float>()), keys(z.bordered()),
        values(z.bordered()), wide_q(HALF<T> ? z.of_rows() : 0), weights(MAP_ROWS * z.columns),
        learned(MAP_ROWS * z.near_columns), far_keys(z.of_far()), far_values(z.of_far()),
        learned_tokens(z.of_near()), q(z.of_rows()), unit_q(z.of_rows()) {
    std::fill_n(keys.data(), z.bordered(), 0.0f);
    std::fill_n(values.data(), z.bordered(), 0.0f);
  }

  int64_t channels() const { return CHANNELS ? CHANNELS : z.channels; }

  // Returns false where no token of the list is on.
  bool enter(int64_t image, int64_t head) {
    const int64_t c = channels();
    b = image, h = head;
    rows.clear();
    for (int64_t t = 0; t < z.tokens; ++t)
      if (gates[z.place(b, t, h)] != 0) rows.push_back(t);
    if (rows.empty()) return false;
    const T *k = of_list(x.k), *v = of_list(x.v), *k_pool = of_list(x.k_pool);
    const int64_t k_stride = x.k.stride(1), v_stride = x.v.stride(1);
    for (int64_t t = 0; t < z.tokens; ++t) {
      // The next heads are beside this one. The hardware does not foresee strides this large.
      __builtin_prefetch(k + t * k_stride + 2 * c, 0, 2);
      __builtin_prefetch(v + t * v_stride + 2 * c, 0, 2);
      widen(keys.data() + z.middle(t), k + t * k_stride, c);
      widen(values.data() + z.middle(t), v + t * v_stride, c);
    }
    const auto key = [&](int64_t p) { return k_pool + p * x.k_pool.stride(1); };
    pack_transposed(far_keys.data(), key, z.pooled, z.far_columns, c);
    pack(far_values.data(), of_list(x.v_pool), x.v_pool.stride(1), z.pooled, z.far_columns, c);
    pack(
        learned_tokens.data(), x.learned_tokens.const_data_ptr<T>() + h * c * z.near_columns,
        z.near_columns, c, c, z.near_columns);
    return true;
  }

  // Keys or values [B, ..., H, C] of this list.
  const T* of_list(const Tensor& of) const {
    return of.const_data_ptr<T>() + b * of.stride(0) + h * of.stride(2);
  }

  // The rows' weights of all keys after the softmax, and those that are learned.
  void weigh(const int32_t* rows, int64_t count) {
    const int64_t c = channels(), padded = round_up(count, MAP_MULTIPLE);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t place = z.place(b, rows[r], h) * c;
      std::memcpy(q.data() + r * c, q_of + place, c * sizeof(T));
      std::memcpy(unit_q.data() + r * c, unit_q_of + place, c * sizeof(T));
      if constexpr (HALF<T>) widen(wide_q.data() + r * c, q.data() + r * c, c);
    }
    if (z.pooled)
      multiply(
          padded, z.far_columns, c, q.data(), c, far_keys.data(), z.far_columns, weights.data(),
          z.columns, false);
    multiply(
        padded, z.near_columns, c, unit_q.data(), c, learned_tokens.data(), z.near_columns,
        learned.data(), z.near_columns, false);
    for (int64_t r = 0; r < count; ++r) weigh_row(r, rows[r]);
  }

  const float* wide_query(int64_t r) {
    if constexpr (HALF<T>) return wide_q.data() + r * channels();
    return reinterpret_cast<const float*>(q.data()) + r * channels();
  }

  void weigh_row(int64_t r, int64_t t) {
    float *s = weights.data() + r * z.columns, *l = learned.data() + r * z.near_columns;
    const float *far_bias = pool_bias + (h * z.tokens + t) * z.pooled;
    const float *near_bias = local_bias + h * z.near, *l_bias = learned_bias + h * z.near;
    const float *outside = z.outside.data() + t * z.near, *corner = keys.data() + z.corner(t);
    const int64_t c = channels(), columns = z.columns / MAP_MULTIPLE * MAP_MULTIPLE;
#pragma omp simd
    for (int64_t p = 0; p < z.pooled; ++p) s[p] += far_bias[p];
    const float* query = wide_query(r);
    for (int64_t w = 0; w < z.near; ++w)
      s[z.pooled + w] = dot(query, corner + z.steps[w], c);
    for (int64_t w = 0; w < z.near; ++w) {
      s[z.pooled + w] += near_bias[w] + outside[w];
      l[w] += l_bias[w];
    }
    // The row is filled up to whole vectors with keys of weight 0.
    std::fill(s + z.pooled + z.near, s + z.columns, -INFINITY);
    const float top = largest(s, columns);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) s[i] = exp2_of<T>((s[i] - top) * LOG2E);
    const float share = 1 / sum(s, columns);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) s[i] *= share;
  }
};

}  // namespace headwise
