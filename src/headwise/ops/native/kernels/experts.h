// A mixture of expert MLPs: each expert over the rows that chose it, a block at a time, transposed.
//
// Activations are columns, [channels, rows], and weights are the first operand as they are stored:
// no weight is ever copied, and the hidden activations of a block stay in the caches.
#pragma once

#include <algorithm>

#include "common.h"

namespace headwise {

constexpr int64_t MOST_ROWS = 512;  // of a block; its weights are read once
constexpr int64_t COLUMNS = 64;  // rows of a block that one product takes
constexpr int64_t CHUNK = 64;  // outputs of one product

enum Nonlinearity { SILU, RELU };

// 1 / (1 + 2^(-x log2 e)), on the side where the power is at most 1.
template <typename T>
inline float sigmoid(float x) {
  const float power = exp2_of<T>(-std::fabs(x) * LOG2E);
  return (x < 0 ? power : 1.0f) / (1 + power);
}

template <typename T, Nonlinearity act>
inline float activate(float x) {
  return act == RELU ? (x > 0 ? x : 0) : x * sigmoid<T>(x);
}

// Two bfloat16 in a word.
inline uint32_t nearest_pair(float first, float second) {
  return nearest_bf16(first) | static_cast<uint32_t>(nearest_bf16(second)) << 16;
}

// Positions in the flattened choices [N·K] of each expert, ascending; -1 goes nowhere.
struct Choices {
  std::vector<int64_t> edges;
  std::vector<int32_t> places;

  Choices(const Tensor& indices, int64_t experts) : edges(experts + 1, 0) {
    const int64_t* chosen = indices.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < indices.numel(); ++i) {
      if (chosen[i] >= 0) ++edges[chosen[i] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) edges[e + 1] += edges[e];
    places.resize(edges[experts]);
    auto next = edges;
    for (int64_t i = 0; i < indices.numel(); ++i)
      if (chosen[i] >= 0) places[next[chosen[i]]++] = static_cast<int32_t>(i);
  }
};

struct ExpertSizes {
  int64_t tokens, dim, top_k, experts, up, hidden;

  ExpertSizes(const Tensor& x, const Tensor& indices, const Tensor& up_proj, const Tensor& down_proj)
      : tokens(x.size(0)), dim(x.size(1)), top_k(indices.size(1)), experts(up_proj.size(0)),
        up(up_proj.size(1)), hidden(down_proj.size(2)) {}

  bool gated() const { return up == 2 * hidden; }
};

// The output of each choice, in `parts`: K tensors [N, D] a part, of which only what is written
// takes memory. One tensor of N·K rows would be so large that the system gives and takes its memory
// in every call, which costs as much as filling it ten times.
template <typename T>
struct Outputs {
  int64_t top_k, dim, parts;
  std::vector<Tensor> tensors;
  std::vector<T*> choices;

  Outputs(const ExpertSizes& z, const Tensor& like, int64_t parts)
      : top_k(z.top_k), dim(z.dim), parts(parts) {
    for (int64_t i = 0; i < top_k * parts; ++i) {
      tensors.push_back(new_empty(like, like.sizes()));
      choices.push_back(tensors.back().template mutable_data_ptr<T>());
    }
  }
  T* row(int64_t place, int64_t part) const {
    return choices[place % top_k * parts + part] + place / top_k * dim;
  }
};

// Two rows of [hidden, columns], activated, as the second operand of a product: see pack().
template <typename T, Nonlinearity act>
void activate_rows(T* out, const float* gate, const float* value, int64_t columns) {
  const auto hidden = [&](int64_t at) {
    const float h = activate<T, act>(gate[at]);
    return value ? h * value[at] : h;
  };
#pragma omp simd
  for (int64_t r = 0; r < columns; ++r) {
    const float even = hidden(r), odd = hidden(COLUMNS + r);
    if constexpr (HALF<T>)
      reinterpret_cast<uint32_t*>(out)[r] = nearest_pair(even, odd);
    else
      out[r] = even, out[COLUMNS + r] = odd;
  }
}

template <typename T, Nonlinearity act>
void expert_block(
    const ExpertSizes& z, const T* x, const float* weights, const T* up, const T* down,
    const int32_t* places, int64_t count, const Outputs<T>& out, T* columns, T* hidden,
    float* raised) {
  const auto width = [&](int64_t first) {
    return std::min(COLUMNS, round_up(count - first, LANES));
  };
  const int64_t most = std::min(CHUNK, z.hidden);
  for (int64_t first = 0; first < count; first += COLUMNS)
    pack_transposed(
        columns + first * z.dim,
        [&](int64_t i) { return x + places[first + i] / z.top_k * z.dim; },
        std::min(COLUMNS, count - first), COLUMNS, z.dim);
  for (int64_t f = 0; f < z.hidden; f += most) {
    const int64_t size = std::min(most, z.hidden - f);
    for (int64_t first = 0; first < count; first += COLUMNS) {
      const int64_t n = width(first);
      const T* b = columns + first * z.dim;
      float* value = z.gated() ? raised + most * COLUMNS : nullptr;
      multiply<true>(
          size, n, z.dim, up + f * z.dim, z.dim, b, COLUMNS, raised, COLUMNS, false);
      if (value)
        multiply<true>(
            size, n, z.dim, up + (z.hidden + f) * z.dim, z.dim, b, COLUMNS, value, COLUMNS, false);
      T* h = hidden + first * z.hidden + f * COLUMNS;
      for (int64_t i = 0; i < size; i += 2)
        activate_rows<T, act>(
            h + i * COLUMNS, raised + i * COLUMNS, value ? value + i * COLUMNS : nullptr, n);
    }
  }
  for (int64_t d = 0; d < z.dim; d += CHUNK) {
    const int64_t size = std::min(CHUNK, z.dim - d);
    for (int64_t first = 0; first < count; first += COLUMNS) {
      multiply<true>(
          size, width(first), z.hidden, down + d * z.hidden, z.hidden, hidden + first * z.hidden,
          COLUMNS, raised, COLUMNS, false);
      const int64_t n = std::min(COLUMNS, count - first);
      float rows[COLUMNS * CHUNK];
      transpose_words(
          reinterpret_cast<uint32_t*>(rows), CHUNK,
          [&](int64_t i) { return reinterpret_cast<const uint32_t*>(raised + i * COLUMNS); }, size,
          round_up(size, LANES), n);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t place = places[first + r];
        for (int64_t i = 0; i < size; ++i) rows[r * CHUNK + i] *= weights[place];
        store(out.row(place, 0) + d, rows + r * CHUNK, size);
      }
    }
  }
}

// Over the first of the outputs, which is as large.
template <typename T, typename PartsOf>
Tensor sum_of_choices(
    const ExpertSizes& z, const Tensor& indices, const Outputs<T>& out, const PartsOf& parts_of) {
  T* rows = out.choices[0];
  const int64_t* chosen = indices.const_data_ptr<int64_t>();
  parallel_for(0, z.tokens, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(z.dim);
    for (int64_t n = begin; n < end; ++n) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t i = n * z.top_k; i < (n + 1) * z.top_k; ++i) {
        const int64_t parts = chosen[i] < 0 ? 0 : parts_of(chosen[i]);
        for (int64_t part = 0; part < parts; ++part) {
          const T* row = out.row(i, part);
          for (int64_t j = 0; j < z.dim; ++j) sum[j] += static_cast<float>(row[j]);
        }
      }
      store(rows + n * z.dim, sum.data(), z.dim);
    }
  });
  return out.tensors[0];
}

template <typename T, Nonlinearity act>
Tensor experts(
    const Tensor& x, const Tensor& weights, const Tensor& indices, const Tensor& up_proj,
    const Tensor& down_proj) {
  const ExpertSizes z(x, indices, up_proj, down_proj);
  const Choices choices(indices, z.experts);
  std::vector<std::tuple<int64_t, int64_t, int64_t>> blocks;
  for (int64_t e = 0; e < z.experts; ++e) {
    const int64_t begin = choices.edges[e], rows = choices.edges[e + 1] - begin;
    const int64_t count = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = i * rows / count;
      blocks.emplace_back(e, begin + first, (i + 1) * rows / count - first);
    }
  }
  const Outputs<T> out(z, x, 1);
  share_out(static_cast<int64_t>(blocks.size()), [&] {
    return [&, columns = Buffer<T>(MOST_ROWS * z.dim), hidden = Buffer<T>(MOST_ROWS * z.hidden),
            raised = Buffer<float>(2 * CHUNK * COLUMNS)](int64_t i) mutable {
      const auto [e, first, count] = blocks[i];
      expert_block<T, act>(
          z, x.const_data_ptr<T>(), weights.const_data_ptr<float>(),
          up_proj.const_data_ptr<T>() + e * z.up * z.dim,
          down_proj.const_data_ptr<T>() + e * z.dim * z.hidden, choices.places.data() + first,
          count, out, columns.data(), hidden.data(), raised.data());
    };
  });
  return sum_of_choices<T>(z, indices, out, [](int64_t) { return 1; });
}

}  // namespace headwise
