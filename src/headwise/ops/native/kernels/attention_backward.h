// Scores again, transposed: [keys, rows], so that five products do without another transposition.
#pragma once

#include <mutex>

#include "attention.h"

namespace headwise {

// What a thread needs for the backward of a block, everything transposed: [keys, rows].
template <typename T>
struct Scratch {
  Buffer<float> s, dp, dq, dk, dv;
  Buffer<T> p, ds, ds_packed, q, dout, q_packed, dout_packed, q_transposed, dout_transposed;
  Buffer<T> k_transposed;

  explicit Scratch(const Sizes& z)
      : s(KEYS * ROWS), dp(KEYS * ROWS), dq(ROWS * z.channels), dk(z.keys * z.channels),
        dv(z.keys * z.channels), p(KEYS * ROWS), ds(KEYS * ROWS), ds_packed(KEYS * ROWS),
        q(ROWS * z.channels), dout(ROWS * z.channels), q_packed(ROWS * z.channels),
        dout_packed(ROWS * z.channels), q_transposed(ROWS * z.channels),
        dout_transposed(ROWS * z.channels), k_transposed(z.channels * round_up(z.keys, 2)) {}
};

struct Operands {
  const Tensor &dy, &q, &k, &v, &gate, &y, &lse;
  float scale;
  Tensor &dq, &dgate;
};

template <typename T>
void backward_rows(
    const Sizes& z, const Operands& x, int64_t list, const int32_t* rows, int64_t count,
    Scratch<T>& w) {
  const int64_t c = z.channels, padded = round_up(count, ROW_MULTIPLE);
  // A float's rounding of lse would be that of all weights of a row: what it cuts off is kept.
  float lse[ROWS] = {}, cut_off[ROWS] = {}, delta[ROWS] = {}, row[1024];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = z.place(list, rows[r]);
    const T *dy = x.dy.const_data_ptr<T>() + place * c, *y = x.y.const_data_ptr<T>() + place * c;
    const float gate = x.gate.const_data_ptr<float>()[place];
    for (int64_t j = 0; j < c; ++j) {
      row[j] = gate * static_cast<float>(dy[j]);
      delta[r] += static_cast<float>(dy[j]) * static_cast<float>(y[j]);
    }
    store(w.dout.data() + r * c, row, c);
    std::memcpy(
        w.q.data() + r * c, x.q.const_data_ptr<T>() + place * c, c * sizeof(T));
    const double exact = x.lse.const_data_ptr<double>()[place];
    lse[r] = static_cast<float>(exact), cut_off[r] = static_cast<float>(exact - lse[r]);
    x.dgate.mutable_data_ptr<float>()[place] = delta[r] / gate;
  }
  pack(w.q_packed.data(), w.q.data(), c, count, padded, c);
  pack(w.dout_packed.data(), w.dout.data(), c, count, padded, c);
  const auto row_of = [&](T* rows) { return [=](int64_t i) { return rows + i * c; }; };
  pack_transposed(w.q_transposed.data(), row_of(w.q.data()), count, padded, c);
  pack_transposed(w.dout_transposed.data(), row_of(w.dout.data()), count, padded, c);
  std::fill_n(w.dq.data(), padded * c, 0.0f);
  const T *k = of_list<T>(x.k, z, list), *v = of_list<T>(x.v, z, list);
  const int64_t end = z.limit(rows[count - 1]) + 1, ks = x.k.stride(1), vs = x.v.stride(1);
  const float to_log2 = x.scale * LOG2E;
  for (int64_t first = 0; first < end; first += KEYS) {
    const int64_t width =
        std::min({KEYS, round_up(end - first, KEY_MULTIPLE), z.keys - first});
    multiply(
        width, padded, c, k + first * ks, ks, w.q_transposed.data(), padded, w.s.data(), padded,
        false);
    multiply(
        width, padded, c, v + first * vs, vs, w.dout_transposed.data(), padded, w.dp.data(), padded,
        false);
    // Rows ascend, so those that see a key are the last ones.
    int64_t seeing = 0;
    for (int64_t j = 0; j < width; ++j) {
      while (seeing < count && z.limit(rows[seeing]) < first + j) ++seeing;
      float *s = w.s.data() + j * padded, *dp = w.dp.data() + j * padded;
      for (int64_t r = 0; r < seeing; ++r) s[r] = 0, dp[r] = 0;
#pragma omp simd
      for (int64_t r = seeing; r < count; ++r) {
        s[r] = exp2_of<T>(s[r] * to_log2 - lse[r] - cut_off[r]);
        dp[r] = s[r] * (dp[r] - delta[r]);
      }
      for (int64_t r = count; r < padded; ++r) s[r] = 0, dp[r] = 0;
      if constexpr (HALF<T>) {
        store(w.p.data() + j * padded, s, padded);
        store(w.ds.data() + j * padded, dp, padded);
      }
    }
    const T* p = HALF<T> ? w.p.data() : reinterpret_cast<const T*>(w.s.data());
    const T* ds = HALF<T> ? w.ds.data() : reinterpret_cast<const T*>(w.dp.data());
    multiply(width, c, padded, p, padded, w.dout_packed.data(), c, w.dv.data() + first * c, c, true);
    multiply(width, c, padded, ds, padded, w.q_packed.data(), c, w.dk.data() + first * c, c, true);
    const int64_t even = round_up(width, 2);
    if constexpr (HALF<T>) pack(w.ds_packed.data(), ds, padded, width, even, padded);
    multiply(
        c, padded, HALF<T> ? even : width, w.k_transposed.data() + first, round_up(z.keys, 2),
        HALF<T> ? w.ds_packed.data() : ds, padded, w.dq.data(), padded, true);
  }
  T* dq = x.dq.mutable_data_ptr<T>();
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = 0; j < c; ++j) row[j] = x.scale * w.dq[j * padded + r];
    store(dq + z.place(list, rows[r]) * c, row, c);
  }
}

// [count, channels] to [channels, columns], 0 from `count` on.
template <typename T>
void transpose(
    T* out, const T* in, int64_t stride, int64_t count, int64_t columns, int64_t channels) {
  for (int64_t j0 = 0; j0 < channels; j0 += 16)
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t j = j0; j < std::min(j0 + 16, channels); ++j)
        out[j * columns + i] = i < count ? in[i * stride + j] : T(0);
}

// Adds what one thread found for a list to dk or dv [B, S, Hkv, C].
template <typename T>
void add_to(Tensor& out, const Sizes& z, int64_t list, float* sums, float factor) {
  for (int64_t j = 0; j < z.keys; ++j) {
    T* row = out.mutable_data_ptr<T>() +
        ((list / z.key_heads * z.keys + j) * z.key_heads + list % z.key_heads) * z.channels;
    float* sum = sums + j * z.channels;
    for (int64_t i = 0; i < z.channels; ++i)
      sum[i] = factor * sum[i] + static_cast<float>(row[i]);
    store(row, sum, z.channels);
  }
}

template <typename T>
void backward(const Operands& x, bool causal, Tensor& dk, Tensor& dv) {
  const Sizes z(x.q, x.k, causal);
  const auto lists = rows_that_are_on(z, x.gate.const_data_ptr<float>());
  // Only where there are fewer lists than threads do threads share one.
  const int64_t parts = std::max<int64_t>(1, at::get_num_threads() / std::max<int64_t>(1, z.lists()));
  std::vector<std::mutex> locks(z.lists());
  share_out(z.lists() * parts, [&] {
    return [&, w = Scratch<T>(z)](int64_t i) mutable {
      const int64_t list = i / parts, part = i % parts;
      const auto& rows = lists[list];
      const int64_t size = static_cast<int64_t>(rows.size());
      if (part * ROWS >= size) return;
      std::fill_n(w.dk.data(), z.keys * z.channels, 0.0f);
      std::fill_n(w.dv.data(), z.keys * z.channels, 0.0f);
      transpose(
          w.k_transposed.data(), of_list<T>(x.k, z, list), x.k.stride(1), z.keys,
          round_up(z.keys, 2), z.channels);
      for (int64_t first = part * ROWS; first < size; first += parts * ROWS)
        backward_rows<T>(
            z, x, list, rows.data() + first, std::min(ROWS, size - first), w);
      const std::lock_guard<std::mutex> lock(locks[list]);
      add_to<T>(dk, z, list, w.dk.data(), x.scale);
      add_to<T>(dv, z, list, w.dv.data(), 1);
    };
  });
}

}  // namespace headwise
