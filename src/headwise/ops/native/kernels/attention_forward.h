// An online softmax over the keys: a block of ROWS rows meets KEYS keys at a step. A row keeps the
// score that its weights are relative to (`peak`), their sum and the weighted sum of the values
// (`out`); where a score exceeds the peak by more than SLACK, both sums shrink by 2^(old peak - new
// peak).
#pragma once

#include <array>
#include <tuple>

#include "visible.h"

namespace headwise {

constexpr float SLACK = 8;

// One pass over scores [n], a multiple of LANES: weights 2^(score · scale - peak) in T, their sum, and
// the largest score.
template <typename T>
std::pair<float, float> weigh(const float* scores, int64_t n, float scale, float peak, T* weights) {
  Floats top = (Floats)load(scores), sum{};
  for (int64_t j = 0; j < n; j += LANES) {
    const Floats score = (Floats)load(scores + j);
    const Floats weight = exp2_of<T>(score * scale - peak);
    top = score > top ? score : top;
    sum += weight;
    store_vector(weights + j, weight);
  }
  return {sum_of(sum), largest_of(top)};
}

inline float largest_of(const float* scores, int64_t n) {
  Floats top = Floats{} - INFINITY;
  for (int64_t j = 0; j < n; j += LANES) {
    const Floats score = (Floats)load(scores + j);
    top = score > top ? score : top;
  }
  return largest_of(top);
}

// A thread's place for a block of rows.
template <typename T>
struct ForwardRows {
  Buffer<float> s, out;
  Buffer<T> p, q;
  std::array<float, ROWS> peak, total;
  std::array<Span, ROWS> spans;
  std::array<Indices, ROWS> indices;
  std::array<bool, ROWS> plain;

  explicit ForwardRows(int64_t channels)
      : s(ROWS * KEYS), out(ROWS * channels), p(HALF<T> ? ROWS * KEYS : 0), q(ROWS * channels) {}

  T* weights(int64_t r) {
    return HALF<T> ? p.data() + r * KEYS : reinterpret_cast<T*>(s.data() + r * KEYS);
  }

  // Scores of a row's keys from `lo` to `hi` to weights; those around them, from `low` to `width`, to
  // weights of 0.
  void soften(
      int64_t r, int64_t low, int64_t lo, int64_t hi, int64_t width, float scale, int64_t c) {
    const int64_t begin = lo / LANES * LANES, end = round_up(hi, LANES);
    float* scores = s.data() + r * KEYS;
    T* own = weights(r);
    std::fill(scores + begin, scores + lo, -INFINITY);
    std::fill(scores + hi, scores + end, -INFINITY);
    const auto relative_to = [&](float top) {
      const float reached = top * scale, old = peak[r];
      if (!(reached > old + SLACK)) return;
      peak[r] = reached;
      const float decay = std::exp2(old - reached);
      total[r] *= decay;
      for (int64_t j = 0; j < c; ++j) out[r * c + j] *= decay;
    };
    const auto weigh_all = [&] {
      const float shift = peak[r] == -INFINITY ? 0.0f : peak[r];
      return weigh<T>(scores + begin, end - begin, scale, shift, own + begin);
    };
    // float32's weights stand where the scores were, so that there is one try.
    const bool sure = !HALF<T> || peak[r] == -INFINITY;
    if (sure) relative_to(largest_of(scores + begin, end - begin));
    auto [sum, top] = weigh_all();
    if (!sure && top * scale > peak[r] + SLACK) {
      relative_to(top);
      sum = weigh_all().first;
    }
    total[r] += sum;
    std::memset(static_cast<void*>(own + low), 0, (begin - low) * sizeof(T));
    std::memset(static_cast<void*>(own + end), 0, (width - end) * sizeof(T));
  }

  void compute(
      const Sizes& z, const Visible& visible, const T* q_of, const float* gates,
      const T* packed_k, const T* packed_v, int64_t list, const int32_t* rows, int64_t count,
      float scale, T* y, double* lse) {
    const int64_t c = z.channels;
    Span all{z.keys, 0};
    for (int64_t r = 0; r < count; ++r) {
      indices[r] = z.indices(list, rows[r]);
      spans[r] = visible.of(indices[r]), plain[r] = visible.plain(indices[r]);
      all = all | spans[r];
      std::memcpy(q.data() + r * c, q_of + z.place(indices[r]) * c, c * sizeof(T));
      peak[r] = -INFINITY, total[r] = 0;
    }
    std::fill_n(out.data(), count * c, 0.0f);
    for (int64_t first = all.from / KEYS * KEYS; first < all.end; first += KEYS) {
      bool seen = false;
      for (int64_t r = 0; r < count && !seen; ++r)
        seen = !(spans[r] & Span{first, first + KEYS}).empty() &&
            (plain[r] || visible.any(indices[r], first));
      if (!seen) continue;
      const int64_t low = std::max<int64_t>(0, all.from - first) / KEY_MULTIPLE * KEY_MULTIPLE;
      const int64_t width = std::min(KEYS, round_up(all.end - first, KEY_MULTIPLE));
      multiply(
          count, width - low, c, q.data(), c, packed_k + first * c + (HALF<T> ? 2 : 1) * low, KEYS,
          s.data() + low, KEYS, false);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t lo = std::clamp(spans[r].from - first, low, width);
        const int64_t hi = std::clamp(spans[r].end - first, low, width);
        if (lo >= hi) {
          std::memset(static_cast<void*>(weights(r) + low), 0, (width - low) * sizeof(T));
          continue;
        }
        if (!plain[r])
          visible.add(
              indices[r], first + lo, first + hi, LOG2E / scale, s.data() + r * KEYS + lo);
        soften(r, low, lo, hi, width, scale, c);
      }
      multiply(
          count, c, width - low, weights(0) + low, KEYS, packed_v + (first + low) * c, c,
          out.data(), c, true);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t place = z.place(indices[r]);
      // Biases of -infinity can hide all that a row might see.
      const bool blind = total[r] == 0;
      // Not times (gate / total): the quotient's rounding would be in every channel of the row.
      float* row = out.data() + r * c;
      for (int64_t j = 0; j < c && !blind; ++j) row[j] = gates[place] * (row[j] / total[r]);
      store(y + place * c, row, c);
      // log1p, whose symbol has not changed in older systems' libraries, as that of log2 has.
      lse[place] =
          blind ? 0 : peak[r] + std::log1p(static_cast<double>(total[r]) - 1) * 1.4426950408889634;
    }
  }
};

template <typename T>
void forward(
    const Sizes& z, const Visible& visible, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& gate, float scale, Tensor& y, Tensor& lse) {
  const int64_t c = z.channels, of_a_list = z.steps() * KEYS * c;
  const float* gates = gate.const_data_ptr<float>();
  T* y_of = y.mutable_data_ptr<T>();
  const auto lists = lists_that_are_on(z, visible, gates, y_of);
  std::vector<std::tuple<int64_t, int64_t>> blocks;
  // List after list, whose keys are then in a cache. Later rows mostly see more keys: of a list, what
  // takes longest starts first.
  for (int64_t list = 0; list < z.lists(); ++list)
    for (int64_t first = round_up(lists[list].size(), ROWS); (first -= ROWS) >= 0;)
      blocks.emplace_back(list, first);
  const Tensor packed = new_empty(q, {2, z.lists() * of_a_list});
  T* packed_k = packed.mutable_data_ptr<T>();
  T* packed_v = packed_k + z.lists() * of_a_list;
  parallel_for(0, z.lists() * z.steps(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t list = i / z.steps(), first = i % z.steps() * KEYS, n = z.keys - first;
      if ((lists[list].span & Span{first, first + KEYS}).empty()) continue;
      const T* keys = of_list<T>(k, z, list) + first * k.stride(1);
      const T* values = of_list<T>(v, z, list) + first * v.stride(1);
      const auto key = [&, stride = k.stride(1)](int64_t j) { return keys + j * stride; };
      pack_transposed(packed_k + i * KEYS * c, key, n, KEYS, c);
      pack(packed_v + i * KEYS * c, values, v.stride(1), n, KEYS, c);
    }
  });
  const T* q_of = q.const_data_ptr<T>();
  double* lse_of = lse.mutable_data_ptr<double>();
  share_out(static_cast<int64_t>(blocks.size()), [&] {
    return [&, own = ForwardRows<T>(c)](int64_t i) mutable {
      const auto [list, first] = blocks[i];
      own.compute(
          z, visible, q_of, gates, packed_k + list * of_a_list, packed_v + list * of_a_list, list,
          lists[list].rows.data() + first, std::min(ROWS, lists[list].size() - first),
          scale * LOG2E, y_of, lse_of);
    };
  });
}

}  // namespace headwise
