// An online softmax over the keys: a block of ROWS rows meets KEYS keys at a step. A row keeps the
// largest score so far (`peak`), the sum of its weights and the weighted sum of the values (`out`);
// where a step has a larger score, both sums shrink by 2^(old peak - new peak).
#pragma once

#include <tuple>

#include "attention.h"

namespace headwise {

template <typename T>
void forward_rows(
    const Sizes& z, const Tensor& q, const Tensor& gate, const T* packed_k, const T* packed_v,
    int64_t list, const int32_t* rows, int64_t count, float scale, Tensor& y, Tensor& lse,
    float* s, T* p, T* q_rows, float* out) {
  const int64_t c = z.channels, padded = round_up(count, ROW_MULTIPLE);
  float peak[ROWS], total[ROWS];
  for (int64_t r = 0; r < count; ++r) {
    std::memcpy(
        q_rows + r * c, q.const_data_ptr<T>() + z.place(list, rows[r]) * c, c * sizeof(T));
    peak[r] = -INFINITY, total[r] = 0;
  }
  std::fill(out, out + padded * c, 0.0f);
  const int64_t end = z.limit(rows[count - 1]) + 1;
  for (int64_t first = 0; first < end; first += KEYS) {
    const int64_t width = std::min(KEYS, round_up(end - first, KEY_MULTIPLE));
    multiply(padded, width, c, q_rows, c, packed_k + first * c, KEYS, s, KEYS, false);
    for (int64_t r = 0; r < count; ++r) {
      float* scores = s + r * KEYS;
      T* weights = HALF<T> ? p + r * KEYS : reinterpret_cast<T*>(scores);
      const int64_t seen = std::clamp<int64_t>(z.limit(rows[r]) + 1 - first, 0, width);
      float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < seen; ++j) top = scores[j] > top ? scores[j] : top;
      if (seen > 0) {
        top = std::max(peak[r], top * scale);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < seen; ++j) {
          const float weight = exp2_of<T>(scores[j] * scale - top);
          sum += weight;
          if constexpr (HALF<T>)
            reinterpret_cast<uint16_t*>(weights)[j] = nearest_bf16(weight);
          else
            scores[j] = weight;
        }
        const float decay = std::exp2(peak[r] - top);
        total[r] = total[r] * decay + sum, peak[r] = top;
        if (decay != 1)
          for (int64_t j = 0; j < c; ++j) out[r * c + j] *= decay;
      }
      std::memset(static_cast<void*>(weights + seen), 0, (width - seen) * sizeof(T));
    }
    const T* weights = HALF<T> ? p : reinterpret_cast<const T*>(s);
    multiply(padded, c, width, weights, KEYS, packed_v + first * c, c, out, c, true);
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t place = z.place(list, rows[r]);
    // Not times (gate / total): the quotient's rounding would be in every channel of the row.
    const float weight = gate.const_data_ptr<float>()[place];
    for (int64_t j = 0; j < c; ++j) out[r * c + j] = weight * (out[r * c + j] / total[r]);
    store(y.mutable_data_ptr<T>() + place * c, out + r * c, c);
    lse.mutable_data_ptr<double>()[place] = peak[r] + std::log2(static_cast<double>(total[r]));
  }
}

template <typename T>
void forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, bool causal, float scale,
    Tensor& y, Tensor& lse) {
  const Sizes z(q, k, causal);
  const int64_t c = z.channels, of_a_list = z.steps() * KEYS * c;
  const auto lists = rows_that_are_on(z, gate.const_data_ptr<float>());
  std::vector<std::tuple<int64_t, int64_t>> blocks;
  // Later rows see more keys. What takes longest starts first.
  for (int64_t first = round_up(z.queries * z.group, ROWS); (first -= ROWS) >= 0;)
    for (int64_t list = 0; list < z.lists(); ++list)
      if (first < static_cast<int64_t>(lists[list].size())) blocks.emplace_back(list, first);
  const Tensor packed = at::empty({2, z.lists() * of_a_list}, q.options());
  T* packed_k = packed.mutable_data_ptr<T>();
  T* packed_v = packed_k + z.lists() * of_a_list;
  at::parallel_for(0, z.lists() * z.steps(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t list = i / z.steps(), first = i % z.steps() * KEYS, n = z.keys - first;
      if (lists[list].empty()) continue;
      const T* keys = of_list<T>(k, z, list) + first * k.stride(1);
      const T* values = of_list<T>(v, z, list) + first * v.stride(1);
      const auto key = [&](int64_t j) { return keys + j * k.stride(1); };
      pack_transposed(packed_k + i * KEYS * c, key, n, KEYS, c);
      pack(packed_v + i * KEYS * c, values, v.stride(1), n, KEYS, c);
    }
  });
  share_out(static_cast<int64_t>(blocks.size()), [&] {
    return [&, s = Buffer<float>(ROWS * KEYS), p = Buffer<T>(HALF<T> ? ROWS * KEYS : 0),
            q_rows = Buffer<T>(ROWS * c), out = Buffer<float>(ROWS * c)](int64_t i) mutable {
      const auto [list, first] = blocks[i];
      const auto& rows = lists[list];
      const int64_t count = std::min<int64_t>(ROWS, rows.size() - first);
      forward_rows<T>(
          z, q, gate, packed_k + list * of_a_list, packed_v + list * of_a_list, list,
          rows.data() + first, count, scale * LOG2E, y, lse, s.data(), p.data(), q_rows.data(),
          out.data());
    };
  });
}

}  // namespace headwise
