// A few query tokens against a long cache: key heads that no row needs are never read.
//
// Reading keys and values is the cost. Keys are cut into pieces, so that every thread has as much to
// do as the others, whichever heads are on. The results of the pieces are merged by the sums of their
// exponentials. Documents in a row, as in a batch of requests, are read one by one, each for its own
// tokens.
#pragma once

#include <array>
#include <tuple>

#include "visible.h"

namespace headwise {

constexpr int64_t PIECE = 512;  // keys
constexpr int64_t TOGETHER = 4;  // keys read at once
constexpr int64_t AHEAD = 4096;  // bytes that are asked for before they are read

// Keys or values of one list [S, C], one after the other or scattered over the rows of pages.
template <typename T>
struct Places {
  const T* first;
  int64_t stride;
  const int64_t* rows;  // [S], or none

  const T* operator[](int64_t i) const { return first + (rows ? rows[i] : i) * stride; }
};

// Keys (or values) from `first` on, four of them; the last of all stands in where there are fewer.
// Memory gives twice as much to a core that asks ahead.
template <typename T>
std::array<const T*, TOGETHER> four(
    const Places<T>& x, int64_t first, int64_t last, int64_t channels) {
  const int64_t ahead = first + AHEAD / static_cast<int64_t>(channels * sizeof(T)) + 1;
  for (int64_t i = ahead; i < std::min(ahead + TOGETHER, last); ++i)
    for (int64_t j = 0; j < channels; j += 64 / sizeof(T)) __builtin_prefetch(x[i] + j);
  const auto at = [&](int64_t i) { return x[std::min(first + i, last - 1)]; };
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

// Rows of a list whose spans overlap, and all keys that one of them sees: a document's.
struct Run {
  int64_t list;
  List of;
  int64_t row, piece;  // How many rows, and pieces times rows, come before it.

  int64_t pieces() const { return (of.span.end - of.span.from + PIECE - 1) / PIECE; }
};

inline std::vector<Run> runs_of(
    const Sizes& z, const Visible& visible, const std::vector<List>& lists) {
  std::vector<Run> runs;
  int64_t row = 0, piece = 0;
  const auto count = [&] {
    if (runs.empty()) return;
    row += runs.back().of.size(), piece += runs.back().of.size() * runs.back().pieces();
  };
  for (int64_t list = 0; list < z.lists(); ++list)
    for (const int32_t i : lists[list].rows) {
      const Span span = visible.of(z.indices(list, i));
      if (runs.empty() || runs.back().list != list || (runs.back().of.span & span).empty()) {
        count();
        runs.push_back({list, {}, row, piece});
      }
      List& own = runs.back().of;
      own.rows.push_back(i), own.span = own.span | span;
    }
  return runs;
}

// One piece of a run, keys from `first` to `last`: for each row its peak, its sum, and the weighted
// values [channels].
template <typename T>
void decode_piece(
    const Sizes& z, const Visible& visible, const Places<T>& keys, const Places<T>& values,
    const Run& run, const float* q, int64_t first, int64_t last, float* s, float* found) {
  const int64_t c = z.channels, n = last - first, count = run.of.size();
  for (int64_t j = 0; j < n; j += TOGETHER) {
    const auto together = four(keys, first + j, last, c);
    for (int64_t r = 0; r < count; ++r) score(s + r * PIECE + j, q + r * c, together, c);
  }
  for (int64_t r = 0; r < count; ++r) {
    float *scores = s + r * PIECE, *own = found + r * (c + 2);
    const Indices at = z.indices(run.list, run.of.rows[r]);
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
    const auto together = four(values, first + j, last, c);
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
    const Tensor& gate, const int64_t* places, float scale, Tensor& y) {
  const int64_t c = z.channels, each = c + 2;
  const float* gates = gate.const_data_ptr<float>();
  const T* q_of = q.const_data_ptr<T>();
  T* y_of = y.mutable_data_ptr<T>();
  const auto runs = runs_of(z, visible, lists_that_are_on(z, visible, gates, y_of));
  if (runs.empty()) return;
  std::vector<std::tuple<int64_t, int64_t>> work;
  int64_t most = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    most = std::max(most, runs[i].of.size());
    for (int64_t piece = 0; piece < runs[i].pieces(); ++piece) work.emplace_back(i, piece);
  }
  // Scaled queries [rows, C], run after run; and the results, [run][piece][row].
  const auto& end = runs.back();
  const int64_t rows = end.row + end.of.size();
  Buffer<float> queries(rows * c), found((end.piece + end.pieces() * end.of.size()) * each);
  for (const Run& run : runs)
    for (int64_t r = 0; r < run.of.size(); ++r) {
      const T* row = q_of + z.place(z.indices(run.list, run.of.rows[r])) * c;
      float* scaled = queries.data() + (run.row + r) * c;
      for (int64_t j = 0; j < c; ++j) scaled[j] = scale * LOG2E * static_cast<float>(row[j]);
    }
  share_out(static_cast<int64_t>(work.size()), [&] {
    return [&, s = Buffer<float>(most * PIECE)](int64_t i) mutable {
      const auto [number, piece] = work[i];
      const Run& run = runs[number];
      const int64_t first = run.of.span.from + piece * PIECE;
      decode_piece<T>(
          z, visible, {of_list<T>(k, z, run.list), k.stride(1), places},
          {of_list<T>(v, z, run.list), v.stride(1), places}, run, queries.data() + run.row * c,
          first, std::min(run.of.span.end, first + PIECE), s.data(),
          found.data() + (run.piece + piece * run.of.size()) * each);
    };
  });
  for (const Run& run : runs)
    for (int64_t r = 0; r < run.of.size(); ++r) {
      const int64_t place = z.place(z.indices(run.list, run.of.rows[r]));
      merge<T>(
          y_of + place * c, found.data() + (run.piece + r) * each, run.pieces(),
          run.of.size() * each, c, gates[place]);
    }
}

}  // namespace headwise
