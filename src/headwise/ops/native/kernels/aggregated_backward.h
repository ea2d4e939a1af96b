// Weights again, then all gradients of a list while its keys and values are at hand.
#pragma once

#include "aggregated.h"

namespace headwise {

// What the images share is summed in parts, then over these, in an order that no thread changes.
struct MapGradients {
  Tensor q, k, v, k_pool, v_pool, gate, unit_q;
  Tensor local_bias, pool_bias, learned_tokens, learned_bias;  // [parts, H, ...], in float32
};

template <typename T, int64_t CHANNELS>
struct MapBackward {
  const Map& z;
  const MapInputs& x;
  const Tensor& dy;
  MapGradients& out;
  MapList<T, CHANNELS> list;
  const int64_t c;
  Buffer<float> wide_dy, d, dl, dq, d_unit_q, dk, dv, dk_pool, dv_pool, d_tokens, transposed;
  // Sums over thousands of rows one by one, which float would round too often.
  Buffer<double> d_local_bias, d_learned_bias;
  Buffer<T> dys, packed_dy, packed_q, packed_unit_q, half, far_keys, far_values, learned_tokens;

  MapBackward(const Map& z, const MapInputs& x, const Tensor& dy, MapGradients& out)
      : z(z), x(x), dy(dy), out(out), list(z, x), c(list.c), wide_dy(MAP_ROWS * c),
        d(MAP_ROWS * z.columns), dl(MAP_ROWS * z.near_columns), dq(MAP_ROWS * c),
        d_unit_q(MAP_ROWS * c), dk(z.bordered()), dv(z.bordered()), dk_pool(z.far_columns * c),
        dv_pool(z.far_columns * c), d_tokens(z.near_columns * c),
        transposed(MAP_ROWS * std::max(z.columns, z.near_columns)),
        d_local_bias(z.near), d_learned_bias(z.near), dys(MAP_ROWS * c),
        packed_dy(MAP_ROWS * c), packed_q(MAP_ROWS * c), packed_unit_q(MAP_ROWS * c),
        half(HALF<T> ? MAP_ROWS * std::max(z.columns, z.near_columns) : 0),
        far_keys(z.far_columns * c), far_values(z.far_columns * c),
        learned_tokens(z.near_columns * c) {}

  void compute(int64_t part, int64_t b, int64_t h) {
    const auto rows = tokens_that_are_on(z, x.gate, b, h);
    if (rows.empty()) return;
    list.enter(b, h);
    enter(h);
    for (size_t first = 0; first < rows.size(); first += MAP_ROWS) {
      const int64_t count = std::min<int64_t>(MAP_ROWS, rows.size() - first);
      block(part, rows.data() + first, count);
    }
    for (int64_t t = 0; t < z.tokens; ++t) {
      store(of_list(out.k, z.tokens) + t * z.heads * c, dk.data() + z.middle(t), c);
      store(of_list(out.v, z.tokens) + t * z.heads * c, dv.data() + z.middle(t), c);
    }
    for (int64_t p = 0; p < z.pooled; ++p) {
      store(of_list(out.k_pool, z.pooled) + p * z.heads * c, dk_pool.data() + p * c, c);
      store(of_list(out.v_pool, z.pooled) + p * z.heads * c, dv_pool.data() + p * c, c);
    }
    float* sums = of_part(out.learned_tokens, part, c * z.near);
    for (int64_t w = 0; w < z.near; ++w)
      for (int64_t j = 0; j < c; ++j) sums[j * z.near + w] += d_tokens[w * c + j];
    for (int64_t w = 0; w < z.near; ++w) {
      of_part(out.local_bias, part, z.near)[w] += d_local_bias[w];
      of_part(out.learned_bias, part, z.near)[w] += d_learned_bias[w];
    }
  }

  // The second operands of the list's products, and sums of 0.
  void enter(int64_t h) {
    const T *k_pool = list.of_list(x.k_pool), *v_pool = list.of_list(x.v_pool);
    const T* tokens = x.learned_tokens.const_data_ptr<T>() + h * c * z.near_columns;
    pack(far_keys.data(), k_pool, x.k_pool.stride(1), z.pooled, z.far_columns, c);
    const auto value = [&](int64_t p) { return v_pool + p * x.v_pool.stride(1); };
    pack_transposed(far_values.data(), value, z.pooled, z.far_columns, c);
    Buffer<T> turned(z.near_columns * c);
    for (int64_t w = 0; w < z.near_columns; ++w)
      for (int64_t j = 0; j < c; ++j) turned[w * c + j] = tokens[j * z.near_columns + w];
    pack(learned_tokens.data(), turned.data(), c, z.near_columns, z.near_columns, c);
    for (auto* sums : {&dk, &dv}) std::fill_n(sums->data(), z.bordered(), 0.0f);
    for (auto* sums : {&dk_pool, &dv_pool}) std::fill_n(sums->data(), z.far_columns * c, 0.0f);
    std::fill_n(d_tokens.data(), z.near_columns * c, 0.0f);
    for (auto* sums : {&d_local_bias, &d_learned_bias}) std::fill_n(sums->data(), z.near, 0.0);
  }

  void block(int64_t part, const int32_t* rows, int64_t count) {
    const int64_t padded = round_up(count, MAP_MULTIPLE);
    list.weigh(rows, count);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = dy.const_data_ptr<T>() + z.place(list.b, rows[r], list.h) * c;
      std::memcpy(dys.data() + r * c, row, c * sizeof(T));
      widen(wide_dy.data() + r * c, row, c);
    }
    pack(packed_dy.data(), dys.data(), c, count, padded, c);
    pack(packed_q.data(), list.q.data(), c, count, padded, c);
    pack(packed_unit_q.data(), list.unit_q.data(), c, count, padded, c);
    if (z.pooled)
      multiply(
          padded, z.far_columns, c, dys.data(), c, far_values.data(), z.far_columns, d.data(),
          z.columns, false);
    std::fill_n(dq.data(), padded * c, 0.0f);
    for (int64_t r = 0; r < count; ++r) row(part, r, rows[r]);
    if (z.pooled) {
      add_transposed(dv_pool, list.weights, z.columns, z.far_columns, count, packed_dy);
      add_transposed(dk_pool, d, z.columns, z.far_columns, count, packed_q);
      multiply(
          padded, c, z.far_columns, operand(d, count * z.columns), z.columns, far_keys.data(), c,
          dq.data(), c, true);
    }
    add_transposed(d_tokens, dl, z.near_columns, z.near_columns, count, packed_unit_q);
    multiply(
        padded, c, z.near_columns, operand(dl, count * z.near_columns), z.near_columns,
        learned_tokens.data(), c, d_unit_q.data(), c, false);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t place = z.place(list.b, rows[r], list.h) * c;
      store(out.q.mutable_data_ptr<T>() + place, dq.data() + r * c, c);
      store(out.unit_q.mutable_data_ptr<T>() + place, d_unit_q.data() + r * c, c);
    }
  }

  // Turns a row's weights into those times its gate and d, the products of dy and the values, into
  // gradients of its scores; then all that a row does to its window.
  void row(int64_t part, int64_t r, int64_t t) {
    const int64_t place = z.place(list.b, t, list.h), all = z.pooled + z.near;
    const float gate = x.gate.const_data_ptr<float>()[place];
    const float *q = list.wide_q.data() + r * c, *y = wide_dy.data() + r * c;
    float *p = list.weights.data() + r * z.columns, *ds = d.data() + r * z.columns;
    float *near = ds + z.pooled, *learned = list.learned.data() + r * z.near_columns;
    float* row_dl = dl.data() + r * z.near_columns;
    for (int64_t w = 0; w < z.near; ++w)
      near[w] = dot(y, list.values.data() + z.corner(t) + z.steps[w], c);
    std::fill_n(row_dl, z.near_columns, 0.0f);
    for (int64_t w = 0; w < z.near; ++w) row_dl[w] = gate * near[w];
    const float mean = dot(p, ds, all);
    out.gate.mutable_data_ptr<float>()[place] = mean + dot(learned, near, z.near);
#pragma omp simd
    for (int64_t i = 0; i < all; ++i) {
      p[i] *= gate;
      ds[i] = p[i] * (ds[i] - mean);
    }
    float* row_dq = dq.data() + r * c;
    for (int64_t w = 0; w < z.near; ++w) {
      const int64_t at = z.corner(t) + z.steps[w];
      add_multiple(dv.data() + at, p[z.pooled + w] + gate * learned[w], y, c);
      add_multiple(dk.data() + at, near[w], q, c);
      add_multiple(row_dq, near[w], list.keys.data() + at, c);
      d_local_bias[w] += near[w], d_learned_bias[w] += row_dl[w];
    }
    add_multiple(of_part(out.pool_bias, part, z.tokens * z.pooled) + t * z.pooled, 1, ds, z.pooled);
  }

  // sums [columns, C] += the transpose of rows [count, columns] times packed [count, C].
  void add_transposed(
      Buffer<float>& sums, Buffer<float>& rows, int64_t stride, int64_t columns, int64_t count,
      Buffer<T>& packed) {
    const int64_t padded = round_up(count, MAP_MULTIPLE);
    transpose_words(
        reinterpret_cast<uint32_t*>(transposed.data()), padded,
        [&](int64_t r) { return reinterpret_cast<uint32_t*>(rows.data() + r * stride); }, count,
        padded, columns);
    multiply(
        columns, c, padded, operand(transposed, columns * padded), padded, packed.data(), c,
        sums.data(), c, true);
  }

  const T* operand(Buffer<float>& from, int64_t n) {
    if constexpr (!HALF<T>) return reinterpret_cast<const T*>(from.data());
    store(half.data(), from.data(), n);
    return half.data();
  }

  T* of_list(Tensor& of, int64_t tokens) {
    return of.mutable_data_ptr<T>() + (list.b * tokens * z.heads + list.h) * c;
  }

  float* of_part(Tensor& of, int64_t part, int64_t size) {
    return of.mutable_data_ptr<float>() + (part * z.heads + list.h) * size;
  }
};

template <typename T, int64_t CHANNELS>
void aggregate_backward(
    const Map& z, const MapInputs& x, const Tensor& dy, int64_t parts, MapGradients& out) {
  share_out(z.heads * parts, [&] {
    return [&, worker = MapBackward<T, CHANNELS>(z, x, dy, out)](int64_t i) mutable {
      for (int64_t b = i / z.heads; b < z.batch; b += parts)
        worker.compute(i / z.heads, b, i % z.heads);
    };
  });
}

}  // namespace headwise
