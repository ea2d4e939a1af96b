// Computes the weights again, then all gradients of a list while its keys and values are in cache.
#pragma once

#include "aggregated.h"

namespace headwise {

// Gradients of what all images share are summed in parts, one for each run of images, and then over
// the parts: the order of the sums does not depend on the threads.
struct MapGradients {
  Tensor q, k, v, k_pool, v_pool, gate, unit_q;
  Tensor local_bias, pool_bias, learned_tokens, learned_bias;  // [parts, H, ...], in float32
};

template <typename T, int64_t CHANNELS>
struct MapBackward {
  const Map& z;
  const MapInputs& x;
  MapGradients& out;
  MapList<T, CHANNELS> list;
  const T* dy_of;
  T *dq_of, *d_unit_q_of;
  float *dgate_of, *d_pool_bias_of;
  Buffer<float> wide_dy, d, dl, dq, d_unit_q, dk, dv, dk_pool, dv_pool, d_tokens, transposed;
  // Thousands of rows are added one by one: float would round too often.
  Buffer<double> d_local_bias, d_learned_bias;
  Buffer<T> dys, packed_dy, packed_q, packed_unit_q, half, far_keys, far_values, learned_tokens;

  MapBackward(const Map& z, const MapInputs& x, const Tensor& dy, MapGradients& out)
      : z(z), x(x), out(out), list(z, x), dy_of(dy.const_data_ptr<T>()),
        dq_of(out.q.mutable_data_ptr<T>()), d_unit_q_of(out.unit_q.mutable_data_ptr<T>()),
        dgate_of(out.gate.mutable_data_ptr<float>()),
        d_pool_bias_of(out.pool_bias.mutable_data_ptr<float>()), wide_dy(z.of_rows()),
        d(MAP_ROWS * z.columns), dl(MAP_ROWS * z.near_columns), dq(z.of_rows()),
        d_unit_q(z.of_rows()), dk(z.bordered()), dv(z.bordered()), dk_pool(z.of_far()),
        dv_pool(z.of_far()), d_tokens(z.of_near()), transposed(MAP_ROWS * z.columns),
        d_local_bias(z.near), d_learned_bias(z.near), dys(z.of_rows()), packed_dy(z.of_rows()),
        packed_q(z.of_rows()), packed_unit_q(z.of_rows()),
        half(HALF<T> ? MAP_ROWS * z.columns : 0), far_keys(z.of_far()), far_values(z.of_far()),
        learned_tokens(z.of_near()) {}

  void compute(int64_t part, int64_t b, int64_t h) {
    if (!list.enter(b, h)) return;
    enter(h);
    const auto& rows = list.rows;
    const int64_t c = list.channels();
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
    const int64_t c = list.channels();
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
    const int64_t c = list.channels(), padded = round_up(count, MAP_MULTIPLE);
    list.weigh(rows, count);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = dy_of + z.place(list.b, rows[r], list.h) * c;
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
      store(dq_of + place, dq.data() + r * c, c);
      store(d_unit_q_of + place, d_unit_q.data() + r * c, c);
    }
  }

  // Turns a row's weights into those times its gate and d, the products of dy and the values, into
  // gradients of its scores; then all that a row does to its window.
  void row(int64_t part, int64_t r, int64_t t) {
    const int64_t c = list.channels(), columns = z.columns / MAP_MULTIPLE * MAP_MULTIPLE;
    const int64_t place = z.place(list.b, t, list.h);
    const float gate = list.gates[place];
    const float *q = list.wide_query(r), *y = wide_dy.data() + r * c;
    float *p = list.weights.data() + r * z.columns, *ds = d.data() + r * z.columns;
    float *near = ds + z.pooled, *learned = list.learned.data() + r * z.near_columns;
    float* row_dl = dl.data() + r * z.near_columns;
    for (int64_t w = 0; w < z.near; ++w)
      near[w] = dot(y, list.values.data() + z.corner(t) + z.steps[w], c);
    std::fill(near + z.near, ds + columns, 0.0f);
    std::fill_n(row_dl, z.near_columns, 0.0f);
    for (int64_t w = 0; w < z.near; ++w) row_dl[w] = gate * near[w];
    const float mean = dot(p, ds, columns);
    dgate_of[place] = mean + dot(learned, near, z.near);
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      p[i] *= gate;
      ds[i] = p[i] * (ds[i] - mean);
    }
    add_multiples(dq.data() + r * c, near, list.keys.data() + z.corner(t), z.steps, c);
    for (int64_t w = 0; w < z.near; ++w) {
      const int64_t at = z.corner(t) + z.steps[w];
      add_multiple(dv.data() + at, p[z.pooled + w] + gate * learned[w], y, c);
      add_multiple(dk.data() + at, near[w], q, c);
      d_local_bias[w] += near[w], d_learned_bias[w] += row_dl[w];
    }
    const int64_t bias = ((part * z.heads + list.h) * z.tokens + t) * z.pooled;
    add_multiple(d_pool_bias_of + bias, 1, ds, z.pooled);
  }

  // sums [columns, C] += the transpose of rows [count, columns] times packed [count, C].
  void add_transposed(
      Buffer<float>& sums, Buffer<float>& rows, int64_t stride, int64_t columns, int64_t count,
      Buffer<T>& packed) {
    const int64_t c = list.channels(), padded = round_up(count, MAP_MULTIPLE);
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
    return of.mutable_data_ptr<T>() + (list.b * tokens * z.heads + list.h) * z.channels;
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
