// The gradients of attention. Scores are computed again, from what the forward left of each row: the
// logarithm (base 2) of the sum of its exponentials.
//
// For a list with rows r that are on and keys j, with o[r] = sum_j p[r,j] v[j] and y = gate · o:
//
//   p[r,j]  = 2^(scale log2(e) q[r]·k[j] - lse[r])
//   dout[r] = gate[r] dy[r]                          delta[r] = dy[r] · y[r]
//   dp[r,j] = dout[r] · v[j]                         ds[r,j]  = p[r,j] (dp[r,j] - delta[r])
//   dv[j]   = sum_r p[r,j] dout[r]                   dgate[r] = delta[r] / gate[r]
//   dk[j]   = scale sum_r ds[r,j] q[r]               dq[r]    = scale sum_j ds[r,j] k[j]
//
// Example: one key, so p = 1; v = 4, gate = 1/2, dy = 3. Then y = 2, delta = 6, dgate = 12; dp = 6,
// so ds = 0: a softmax over one key is constant, and q and k get no gradient. dv = 1.5.
//
// Blocks of ROWS rows meet steps of KEYS keys. Scores stand transposed, [keys, rows]: then four of
// the five products read what they need as it lies, and only dq needs ds turned, [rows, keys].
#pragma once

#include <mutex>

#include "visible.h"

namespace headwise {

// What a thread needs for a block of rows and a step of keys:
//   s, dp            [KEYS, rows] in float32: scores and products, in place turned into p and ds
//   p, ds            the same in bfloat16, as operands of products
//   ds_rows          [ROWS, KEYS], half_ds_rows in bfloat16: ds turned
//   q, dout          [ROWS, channels]: rows gathered; *_packed and *_transposed are second operands
//   dq               [ROWS, channels] in float32: the sum over all steps
//   dk, dv           [all keys, channels] in float32, rows `stride` apart: sums over the list's
//                    blocks, in memory of the thread or in place in the result
template <typename T>
struct Scratch {
  Buffer<float> s, dp, ds_rows, dq, own_dk, own_dv;
  float *dk, *dv;
  int64_t stride;
  Buffer<T> p, ds, half_ds_rows, q, dout, q_packed, dout_packed, q_transposed, dout_transposed;
  Buffer<T> k_packed;

  Scratch(const Sizes& z, bool own)
      : s(KEYS * ROWS), dp(KEYS * ROWS), ds_rows(ROWS * KEYS), dq(ROWS * z.channels),
        own_dk(own ? z.keys * z.channels : 0), own_dv(own ? z.keys * z.channels : 0),
        dk(own_dk.data()), dv(own_dv.data()), stride(z.channels), p(HALF<T> ? KEYS * ROWS : 0),
        ds(HALF<T> ? KEYS * ROWS : 0), half_ds_rows(HALF<T> ? ROWS * KEYS : 0),
        q(ROWS * z.channels), dout(ROWS * z.channels), q_packed(ROWS * z.channels),
        dout_packed(ROWS * z.channels), q_transposed(ROWS * z.channels),
        dout_transposed(ROWS * z.channels),
        k_packed(HALF<T> ? round_up(z.keys, 2) * z.channels : 0) {}
};

constexpr int64_t ROW_MULTIPLE = 32;

struct Operands {
  const Tensor &dy, &q, &k, &v, &gate, &y, &lse;
  float scale;
  Tensor &dq, &dgate;
};

// The tensors of which a block reads a row at a time: asking each time for where they are is slow.
template <typename T>
struct RowPointers {
  const T *dy, *q, *y;
  const float* gate;
  const double* lse;
  T* dq;
  float* dgate;

  explicit RowPointers(const Operands& x)
      : dy(x.dy.const_data_ptr<T>()), q(x.q.const_data_ptr<T>()), y(x.y.const_data_ptr<T>()),
        gate(x.gate.const_data_ptr<float>()), lse(x.lse.const_data_ptr<double>()),
        dq(x.dq.mutable_data_ptr<T>()), dgate(x.dgate.mutable_data_ptr<float>()) {}
};

template <typename T>
void backward_rows(
    const Sizes& z, const Visible& visible, const Operands& x, const RowPointers<T>& of,
    int64_t list, const int32_t* rows, int64_t count, int64_t last_key, Scratch<T>& w) {
  const int64_t c = z.channels, padded = round_up(count, ROW_MULTIPLE);
  // 1. Gather the rows of the block: q, dout = gate dy, delta = dy y; and dgate, which needs no key.
  // A float's rounding of lse would be that of all weights of a row: what it cuts off is kept.
  // Rows that are padding see nothing.
  float lse[ROWS] = {}, cut_off[ROWS] = {}, delta[ROWS] = {}, row[1024];
  int32_t from[ROWS] = {}, end[ROWS] = {};
  Indices indices[ROWS];
  Span all{z.keys, 0}, common{0, z.keys};
  bool plain = true;
  for (int64_t r = 0; r < count; ++r) {
    indices[r] = z.indices(list, rows[r]);
    const Span span = visible.of(indices[r]);
    all = all | span, common = common & span;
    from[r] = static_cast<int32_t>(span.from), end[r] = static_cast<int32_t>(span.end);
    plain = plain && visible.plain(indices[r]);
    const int64_t place = z.place(indices[r]);
    const T *dy = of.dy + place * c, *y = of.y + place * c;
    const float gate = of.gate[place];
    for (int64_t j = 0; j < c; ++j) {
      row[j] = gate * static_cast<float>(dy[j]);
      delta[r] += static_cast<float>(dy[j]) * static_cast<float>(y[j]);
    }
    store(w.dout.data() + r * c, row, c);
    std::memcpy(w.q.data() + r * c, of.q + place * c, c * sizeof(T));
    lse[r] = static_cast<float>(of.lse[place]);
    cut_off[r] = static_cast<float>(of.lse[place] - lse[r]);
    of.dgate[place] = delta[r] / gate;
  }
  // 2. The rows as second operands: packed [rows, channels] for dk and dv, transposed
  // [channels, rows] for scores and dp.
  pack(w.q_packed.data(), w.q.data(), c, count, padded, c);
  pack(w.dout_packed.data(), w.dout.data(), c, count, padded, c);
  const auto row_of = [&](T* rows) { return [=](int64_t i) { return rows + i * c; }; };
  pack_transposed(w.q_transposed.data(), row_of(w.q.data()), count, padded, c);
  pack_transposed(w.dout_transposed.data(), row_of(w.dout.data()), count, padded, c);
  std::fill_n(w.dq.data(), padded * c, 0.0f);
  const T *k = of_list<T>(x.k, z, list), *v = of_list<T>(x.v, z, list);
  const int64_t ks = x.k.stride(1), vs = x.v.stride(1);
  const float to_log2 = x.scale * LOG2E;
  // 3. All keys that some row sees, a step at a time; pairs of keys stay together. A step ends
  // where the list's last key is, or at one of few widths.
  for (int64_t step = all.from / KEYS * KEYS; step < all.end; step += KEYS) {
    bool seen = plain;
    for (int64_t r = 0; r < count && !seen; ++r) seen = visible.any(indices[r], step);
    if (!seen) continue;
    const int64_t first = std::max(step, all.from / 2 * 2);
    const int64_t width =
        std::min({step + KEYS - first, round_up(all.end - first, KEY_MULTIPLE), last_key - first});
    // q k and dout v: [width, padded] = [width, channels] times [channels, padded].
    multiply(
        width, padded, c, k + first * ks, ks, w.q_transposed.data(), padded, w.s.data(), padded,
        false);
    multiply(
        width, padded, c, v + first * vs, vs, w.dout_transposed.data(), padded, w.dp.data(), padded,
        false);
    if (!plain)
      for (int64_t r = 0; r < count; ++r) {
        const Span span = Span{from[r], end[r]} & Span{first, first + width};
        if (!span.empty())
          visible.add(
              indices[r], span.from, span.end, LOG2E / to_log2,
              w.s.data() + (span.from - first) * padded + r, padded);
      }
    // s becomes p and dp becomes ds, key by key.
    const bool all_seen = common.from <= first && first + width <= common.end && count == padded;
    for (int64_t j = 0; j < width; ++j) {
      float *s = w.s.data() + j * padded, *dp = w.dp.data() + j * padded;
      for (int64_t r = 0; r < padded; r += LANES) {
        const auto at = [r](const float* of) { return (Floats)load(of + r); };
        Floats weight = exp2_of<T>(at(s) * to_log2 - at(lse) - at(cut_off));
        Floats dscore = weight * (at(dp) - at(delta));
        if (!all_seen) {
          const int32_t key = static_cast<int32_t>(first + j);
          const auto sees = ((Whole)load(from + r) <= key) & ((Whole)load(end + r) > key);
          weight = (Floats)((Whole)weight & sees), dscore = (Floats)((Whole)dscore & sees);
        }
        store(s + r, (Words)weight), store(dp + r, (Words)dscore);
        if constexpr (HALF<T>) {
          store_vector(w.p.data() + j * padded + r, weight);
          store_vector(w.ds.data() + j * padded + r, dscore);
        }
      }
    }
    // dv += p dout and dk += ds q: [width, channels] = [width, padded] times [padded, channels].
    const T* p = HALF<T> ? w.p.data() : reinterpret_cast<const T*>(w.s.data());
    const T* ds = HALF<T> ? w.ds.data() : reinterpret_cast<const T*>(w.dp.data());
    multiply(
        width, c, padded, p, padded, w.dout_packed.data(), c, w.dv + first * w.stride, w.stride,
        true);
    multiply(
        width, c, padded, ds, padded, w.q_packed.data(), c, w.dk + first * w.stride, w.stride,
        true);
    // dq += ds k: [padded, channels] = [padded, width] times [width, channels].
    const int64_t even = round_up(width, 2);
    transpose_words(
        reinterpret_cast<uint32_t*>(w.ds_rows.data()), KEYS,
        [&](int64_t j) { return reinterpret_cast<uint32_t*>(w.dp.data() + j * padded); }, width,
        even, padded);
    if constexpr (HALF<T>) {
      for (int64_t r = 0; r < padded; ++r)
        store(w.half_ds_rows.data() + r * KEYS, w.ds_rows.data() + r * KEYS, even);
      multiply(
          padded, c, even, w.half_ds_rows.data(), KEYS, w.k_packed.data() + first * c, c,
          w.dq.data(), c, true);
    } else {
      multiply(
          padded, c, width, w.ds_rows.data(), KEYS, k + first * ks, ks, w.dq.data(), c, true);
    }
  }
  // 4. The sums of dq to where their rows stand.
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = 0; j < c; ++j) row[j] = x.scale * w.dq[r * c + j];
    store(of.dq + z.place(indices[r]) * c, row, c);
  }
}

// Where dk or dv [B, S, Hkv, C] of a list begin; keys are key_heads * channels apart.
template <typename T>
T* of_result(Tensor& out, const Sizes& z, int64_t list) {
  return out.mutable_data_ptr<T>() +
      (list / z.key_heads * z.keys * z.key_heads + list % z.key_heads) * z.channels;
}

// Adds what one thread found for a list's keys to dk or dv.
template <typename T>
void add_to(T* out, const Sizes& z, const Span& keys, float* sums, float factor) {
  for (int64_t j = keys.from; j < keys.end; ++j) {
    T* row = out + j * z.key_heads * z.channels;
    float* sum = sums + j * z.channels;
    for (int64_t i = 0; i < z.channels; ++i)
      sum[i] = factor * sum[i] + static_cast<float>(row[i]);
    store(row, sum, z.channels);
  }
}

template <typename T>
void backward(
    const Sizes& z, const Visible& visible, const Operands& x, Tensor& dk, Tensor& dv) {
  const RowPointers<T> of(x);
  const auto lists = lists_that_are_on(z, visible, of.gate, of.dq);
  // A list belongs to one thread; where there are fewer lists than threads, `parts` threads share
  // one, every parts-th block each, and add their dk and dv one after the other.
  const int64_t parts = std::max<int64_t>(1, num_threads() / std::max<int64_t>(1, z.lists()));
  // Sums of a thread alone in float32 need no memory of their own.
  const bool in_place = !HALF<T> && parts == 1;
  std::vector<std::mutex> locks(z.lists());
  share_out(z.lists() * parts, [&] {
    return [&, w = Scratch<T>(z, !in_place)](int64_t i) mutable {
      const int64_t list = i / parts, part = i % parts;
      const auto& rows = lists[list].rows;
      const int64_t size = lists[list].size(), c = z.channels;
      if (part * ROWS >= size) return;
      // Keys are taken in pairs.
      const Span keys{lists[list].span.from / 2 * 2, lists[list].span.end};
      const int64_t first_key = keys.from * c, num_keys = keys.end - keys.from;
      T *own_dk = of_result<T>(dk, z, list), *own_dv = of_result<T>(dv, z, list);
      if (in_place) {
        w.dk = reinterpret_cast<float*>(own_dk), w.dv = reinterpret_cast<float*>(own_dv);
        w.stride = z.key_heads * z.channels;
      } else {
        std::fill_n(w.dk + first_key, num_keys * c, 0.0f);
        std::fill_n(w.dv + first_key, num_keys * c, 0.0f);
      }
      if constexpr (HALF<T>)
        pack(
            w.k_packed.data() + first_key, of_list<T>(x.k, z, list) + keys.from * x.k.stride(1),
            x.k.stride(1), num_keys, round_up(num_keys, 2), c);
      for (int64_t first = part * ROWS; first < size; first += parts * ROWS)
        backward_rows<T>(
            z, visible, x, of, list, rows.data() + first, std::min(ROWS, size - first), keys.end,
            w);
      if (in_place) {
        for (int64_t j = keys.from; j < keys.end; ++j)
          for (int64_t i = 0; i < c; ++i) w.dk[j * w.stride + i] *= x.scale;
        return;
      }
      const std::lock_guard<std::mutex> lock(locks[list]);
      add_to<T>(own_dk, z, keys, w.dk, x.scale);
      add_to<T>(own_dv, z, keys, w.dv, 1);
    };
  });
}

}  // namespace headwise
