// What both passes of aggregated attention share: the weights of the rows that are on.
//
// A list is one head of one image, a row a token that is on; blocks of rows multiply with the
// pooled keys, the window is taken row by row from a map with a border of zeros. All scores of a
// row stand side by side, pooled ones first, so that one softmax does.
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
  // Where a token's window starts in a bordered map, and where the token itself is.
  int64_t corner(int64_t t) const { return (t / width * wide + t % width) * channels; }
  int64_t middle(int64_t t) const { return corner(t) + (border * wide + border) * channels; }
};

// Biases are float32, whatever the rest; learned_tokens are [H, C, near_columns], 0 beyond near.
struct MapInputs {
  const Tensor &q, &k, &v, &k_pool, &v_pool, &gate, &local_bias, &pool_bias, &unit_q,
      &learned_tokens, &learned_bias;
};

inline std::vector<int32_t> tokens_that_are_on(
    const Map& z, const Tensor& gate, int64_t b, int64_t h) {
  std::vector<int32_t> rows;
  for (int64_t t = 0; t < z.tokens; ++t)
    if (gate.const_data_ptr<float>()[z.place(b, t, h)] != 0) rows.push_back(t);
  return rows;
}

template <typename T>
void widen(float* out, const T* in, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[i]);
}

inline float dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline void add_multiple(float* out, float factor, const float* in, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += factor * in[i];
}

// One list at a time: its keys and values, and the weights of a block of its rows. CHANNELS is
// the number of channels where it is known at compile time, else 0.
template <typename T, int64_t CHANNELS>
struct MapList {
  const Map& z;
  const MapInputs& x;
  const int64_t c;
  int64_t b = 0, h = 0;
  Buffer<float> keys, values, wide_q, weights, learned;
  Buffer<T> far_keys, far_values, learned_tokens, q, unit_q;

  MapList(const Map& z, const MapInputs& x)
      : z(z), x(x), c(CHANNELS ? CHANNELS : z.channels), keys(z.bordered()), values(z.bordered()),
        wide_q(MAP_ROWS * c), weights(MAP_ROWS * z.columns), learned(MAP_ROWS * z.near_columns),
        far_keys(c * z.far_columns), far_values(c * z.far_columns),
        learned_tokens(c * z.near_columns), q(MAP_ROWS * c), unit_q(MAP_ROWS * c) {
    std::fill_n(keys.data(), z.bordered(), 0.0f);
    std::fill_n(values.data(), z.bordered(), 0.0f);
  }

  void enter(int64_t image, int64_t head) {
    b = image, h = head;
    const T *k = of_list(x.k), *v = of_list(x.v), *k_pool = of_list(x.k_pool);
    for (int64_t t = 0; t < z.tokens; ++t) {
      widen(keys.data() + z.middle(t), k + t * x.k.stride(1), c);
      widen(values.data() + z.middle(t), v + t * x.v.stride(1), c);
    }
    const auto key = [&](int64_t p) { return k_pool + p * x.k_pool.stride(1); };
    pack_transposed(far_keys.data(), key, z.pooled, z.far_columns, c);
    pack(far_values.data(), of_list(x.v_pool), x.v_pool.stride(1), z.pooled, z.far_columns, c);
    pack(
        learned_tokens.data(), x.learned_tokens.const_data_ptr<T>() + h * c * z.near_columns,
        z.near_columns, c, c, z.near_columns);
  }

  // Keys or values [B, ..., H, C] of this list.
  const T* of_list(const Tensor& of) const {
    return of.const_data_ptr<T>() + b * of.stride(0) + h * of.stride(2);
  }

  // The rows' weights of all keys after the softmax, and those that are learned.
  void weigh(const int32_t* rows, int64_t count) {
    const int64_t padded = round_up(count, MAP_MULTIPLE);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t place = z.place(b, rows[r], h) * c;
      std::memcpy(q.data() + r * c, x.q.const_data_ptr<T>() + place, c * sizeof(T));
      std::memcpy(unit_q.data() + r * c, x.unit_q.const_data_ptr<T>() + place, c * sizeof(T));
      widen(wide_q.data() + r * c, q.data() + r * c, c);
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

  void weigh_row(int64_t r, int64_t t) {
    float *s = weights.data() + r * z.columns, *l = learned.data() + r * z.near_columns;
    const float* bias = x.pool_bias.const_data_ptr<float>() + (h * z.tokens + t) * z.pooled;
    const float* near_bias = x.local_bias.const_data_ptr<float>() + h * z.near;
    const float* learned_bias = x.learned_bias.const_data_ptr<float>() + h * z.near;
    const float *outside = z.outside.data() + t * z.near, *corner = keys.data() + z.corner(t);
    const int64_t all = z.pooled + z.near;
#pragma omp simd
    for (int64_t p = 0; p < z.pooled; ++p) s[p] += bias[p];
    for (int64_t w = 0; w < z.near; ++w)
      s[z.pooled + w] = dot(wide_q.data() + r * c, corner + z.steps[w], c);
    for (int64_t w = 0; w < z.near; ++w) {
      s[z.pooled + w] += near_bias[w] + outside[w];
      l[w] += learned_bias[w];
    }
    float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < all; ++i) top = s[i] > top ? s[i] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < all; ++i) {
      s[i] = exp2_of<T>((s[i] - top) * LOG2E);
      sum += s[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < all; ++i) s[i] /= sum;
  }
};

}  // namespace headwise
