// A few query tokens against a long cache: key heads that no row needs are never read.
//
// Reading keys and values is the cost. Keys are cut into pieces, so that every thread has as much to
// do as the others, whichever heads are on. The results of the pieces are merged by the sums of their
// exponentials.
#pragma once

#include <array>
#include <tuple>

#include "visible.h"

namespace headwise {

constexpr int64_t PIECE = 512;  // keys
constexpr int64_t TOGETHER = 4;  // keys read at once
constexpr int64_t AHEAD = 4096;  // bytes that are asked for before they are read

// Four keys (or values) from `first` on; the last one stands in where there are fewer. Memory gives
// twice as much to a core that asks ahead; asking beyond the last one does no harm.
template <typename T>
std::array<const T*, TOGETHER> four(
    const T* x, int64_t stride, int64_t first, int64_t size, int64_t channels) {
  const int64_t ahead = first + AHEAD / static_cast<int64_t>(channels * sizeof(T)) + 1;
  for (int64_t i = ahead; i < ahead + TOGETHER; ++i)
    for (int64_t j = 0; j < channels; j += 64 / sizeof(T)) __builtin_prefetch(x + i * stride + j);
  const auto at = [&](int64_t i) { return x + std::min(first + i, size - 1) * stride; };
  return {at(0), at(1), at(2), at(3)};
}

template <typename T>
void score(float* s, const float* q, const std::array<const T*, TOGETHER>& keys, int64_t channels) {
  const T *ka = keys[0], *kb = keys[1], *kc = keys[2], *kd = keys[3];
  float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < channels; ++i) {
    a += q[i] * static_cast<float>(ka[i]);
    b += q[i] * static_cast<float>(kb[i]);
    c += q[i] * static_cast<float>(kc[i]);
    d += q[i] * static_cast<float>(kd[i]);
  }
  s[0] = a, s[1] = b, s[2] = c, s[3] = d;
}

template <typename T>
void add_values(
    float* out, const float* p, const std::array<const T*, TOGETHER>& values, int64_t channels) {
  const T *va = values[0], *vb = values[1], *vc = values[2], *vd = values[3];
  const float a = p[0], b = p[1], c = p[2], d = p[3];
#pragma omp simd
  for (int64_t i = 0; i < channels; ++i)
    out[i] += a * static_cast<float>(va[i]) + b * static_cast<float>(vb[i]) +
        c * static_cast<float>(vc[i]) + d * static_cast<float>(vd[i]);
}

// Scores to weights, in place; returns their peak (in powers of 2) and sum.
inline std::pair<float, float> to_weights(float* s, int64_t n) {
  float peak = -INFINITY, total = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t j = 0; j < n; ++j) peak = s[j] > peak ? s[j] : peak;
  if (peak == -INFINITY) {
    // Either no key is seen, or the scores are NaN, and then the output must be NaN.
    if (std::any_of(s, s + n, [](float score) { return std::isnan(score); })) peak = total = NAN;
    std::fill_n(s, n, 0.0f);
    return {peak, total};
  }
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    s[j] = exp2_of<float>(s[j] - peak);
    total += s[j];
  }
  return {peak, total};
}

// One piece of a list, keys from `first` to `last`: for each row its peak, its sum, and the weighted
// values [channels].
template <typename T>
void decode_piece(
    const Sizes& z, const Visible& visible, const Tensor& k, const Tensor& v, int64_t list,
    const std::vector<int32_t>& rows, const float* q, int64_t first, int64_t last, float* s,
    float* found) {
  const int64_t c = z.channels, n = last - first, count = static_cast<int64_t>(rows.size());
  const int64_t k_stride = k.stride(1), v_stride = v.stride(1);
  const T* keys = of_list<T>(k, z, list) + first * k_stride;
  const T* values = of_list<T>(v, z, list) + first * v_stride;
  for (int64_t j = 0; j < n; j += TOGETHER) {
    const auto together = four(keys, k_stride, j, n, c);
    for (int64_t r = 0; r < count; ++r) score(s + r * PIECE + j, q + r * c, together, c);
  }
  for (int64_t r = 0; r < count; ++r) {
    float *scores = s + r * PIECE, *own = found + r * (c + 2);
    const Indices at = z.indices(list, rows[r]);
    const Span span = visible.of(at);
    const int64_t lo = std::clamp(span.from - first, int64_t{0}, n);
    const int64_t hi = std::clamp(span.end - first, lo, n);
    std::fill(scores, scores + lo, -INFINITY);
    std::fill(scores + hi, scores + n, -INFINITY);
    if (!visible.plain(at)) visible.add(at, first + lo, first + hi, LOG2E, scores + lo);
    std::tie(own[0], own[1]) = to_weights(scores, n);
    std::fill(scores + n, scores + round_up(n, TOGETHER), 0.0f);
    std::fill_n(own + 2, c, 0.0f);
  }
  for (int64_t j = 0; j < n; j += TOGETHER) {
    const auto together = four(values, v_stride, j, n, c);
    for (int64_t r = 0; r < count; ++r)
      add_values(found + r * (c + 2) + 2, s + r * PIECE + j, together, c);
  }
}

// The pieces of a row become one: y = gate · sum of values / sum of weights.
template <typename T>
void merge(T* y, const float* found, int64_t pieces, int64_t stride, int64_t c, float gate) {
  float peak = -INFINITY, total = 0;
  std::vector<float> out(c, 0.0f);
  for (int64_t i = 0; i < pieces; ++i) peak = std::max(peak, found[i * stride]);
  for (int64_t i = 0; i < pieces; ++i) {
    const float* own = found + i * stride;
    if (own[0] == -INFINITY) continue;
    const float factor = std::exp2(own[0] - peak);
    total += factor * own[1];
    for (int64_t j = 0; j < c; ++j) out[j] += factor * own[2 + j];
  }
  for (int64_t j = 0; j < c && total != 0; ++j) out[j] = gate * (out[j] / total);
  store(y, out.data(), c);
}

template <typename T>
void decode(
    const Sizes& z, const Visible& visible, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& gate, float scale, Tensor& y) {
  const int64_t c = z.channels, pieces = (z.keys + PIECE - 1) / PIECE, each = c + 2;
  const float* gates = gate.const_data_ptr<float>();
  const T* q_of = q.const_data_ptr<T>();
  T* y_of = y.mutable_data_ptr<T>();
  const auto lists = lists_that_are_on(z, visible, gates, y_of);
  std::vector<std::tuple<int64_t, int64_t>> work;
  std::vector<int64_t> starts(z.lists());
  int64_t rows = 0, most = 0;
  for (int64_t list = 0; list < z.lists(); ++list) {
    const List& own = lists[list];
    starts[list] = rows, rows += own.size(), most = std::max(most, own.size());
    for (int64_t piece = own.span.from / PIECE; piece * PIECE < own.span.end; ++piece)
      work.emplace_back(list, piece);
  }
  // Scaled queries [rows, C], list after list; and the results, [list][piece][row].
  Buffer<float> queries(rows * c), found(rows * pieces * each);
  for (int64_t i = 0; i < rows * pieces; ++i) found[i * each] = -INFINITY;
  for (int64_t list = 0; list < z.lists(); ++list)
    for (int64_t r = 0; r < lists[list].size(); ++r) {
      const T* row = q_of + z.place(z.indices(list, lists[list].rows[r])) * c;
      float* scaled = queries.data() + (starts[list] + r) * c;
      for (int64_t j = 0; j < c; ++j) scaled[j] = scale * LOG2E * static_cast<float>(row[j]);
    }
  share_out(static_cast<int64_t>(work.size()), [&] {
    return [&, s = Buffer<float>(most * PIECE)](int64_t i) mutable {
      const auto [list, piece] = work[i];
      const List& own = lists[list];
      decode_piece<T>(
          z, visible, k, v, list, own.rows, queries.data() + starts[list] * c,
          std::max(own.span.from, piece * PIECE), std::min(own.span.end, (piece + 1) * PIECE),
          s.data(), found.data() + (starts[list] * pieces + piece * own.size()) * each);
    };
  });
  for (int64_t list = 0; list < z.lists(); ++list) {
    const int64_t count = lists[list].size();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t place = z.place(z.indices(list, lists[list].rows[r]));
      merge<T>(
          y_of + place * c, found.data() + (starts[list] * pieces + r) * each, pieces,
          count * each, c, gates[place]);
    }
  }
}

}  // namespace headwise
