// The backward of a mixture of expert MLPs. With w the weight of a choice, for each expert
//
//   h = act(W_up x),   dh = W_downᵀ dy,   dw = dh·h,   dW_down = dy (w h)ᵀ
//   dr = w dh act',    dW_up = dr xᵀ,     dx = W_upᵀ dr
//
// Activations are rows. Hidden units are walked over some at a time and computed again, so that all
// that is theirs stays in the caches, and a weight's gradient is summed in one place.
#pragma once

#include "experts.h"

namespace headwise {

constexpr int64_t MOST_PARTS = 16;  // of an expert; each has a dx of its own

// What one thread computes: all hidden units of an expert over all of its rows. The units of an
// expert that has many of the rows are divided, and dx is the sum of what the parts say.
struct HiddenPart {
  int64_t expert, part, first, end;
};

// How many parts the hidden units of each expert have: so many that no thread waits for long.
inline std::vector<int64_t> parts_of_experts(const ExpertSizes& z, const Choices& choices) {
  const int64_t total = std::max<int64_t>(1, choices.edges[z.experts]);
  const int64_t units = 2 * num_threads();
  const int64_t most = std::min(MOST_PARTS, (z.hidden + CHUNK - 1) / CHUNK);
  std::vector<int64_t> parts;
  for (int64_t e = 0; e < z.experts; ++e) {
    const int64_t rows = choices.edges[e + 1] - choices.edges[e];
    parts.push_back(std::clamp<int64_t>((rows * units + total / 2) / total, 1, most));
  }
  return parts;
}

// The parts of all experts, the largest first.
inline std::vector<HiddenPart> hidden_parts(
    const ExpertSizes& z, const Choices& choices, const std::vector<int64_t>& parts) {
  const int64_t chunks = (z.hidden + CHUNK - 1) / CHUNK;
  std::vector<HiddenPart> all;
  for (int64_t e = 0; e < z.experts; ++e)
    for (int64_t i = 0; i < parts[e]; ++i)
      all.push_back(
          {e, i, i * chunks / parts[e] * CHUNK,
           std::min(z.hidden, (i + 1) * chunks / parts[e] * CHUNK)});
  const auto work = [&](const HiddenPart& x) {
    return (choices.edges[x.expert + 1] - choices.edges[x.expert]) * (x.end - x.first);
  };
  std::stable_sort(all.begin(), all.end(), [&](const HiddenPart& a, const HiddenPart& b) {
    return work(a) > work(b);
  });
  return all;
}

// Rows of a block with zeros behind them. For matrix tiles torch compiles a product for each number
// of rows that it sums over; multiples keep these few.
template <typename T>
int64_t filled_up(int64_t rows) {
  return round_up(rows, HALF<T> && has_matrix_tiles() ? 32 : 2);
}

// Rows of float32 as the second operand of a product: see pack().
template <typename T>
void pack_rounded(T* out, const float* in, int64_t rows, int64_t columns) {
  if constexpr (HALF<T>) {
    auto* words = reinterpret_cast<uint32_t*>(out);
    for (int64_t i = 0; i < rows; i += 2) {
      const float *even = in + i * columns, *odd = even + columns;
      uint32_t* pairs = words + i / 2 * columns;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j)
        pairs[j] = nearest_pair(even[j], odd[j]);
    }
  } else {
    std::memcpy(out, in, rows * columns * sizeof(float));
  }
}

// Rows as the first operand of products over rows: out [channels, columns], 0 from `count` on.
template <typename T>
void transpose(T* out, T* pairs, const T* rows, int64_t count, int64_t columns, int64_t channels) {
  pack_transposed(
      HALF<T> ? pairs : out, [&](int64_t i) { return rows + i * channels; }, count, columns,
      channels);
  if constexpr (HALF<T>) {
    auto* half = reinterpret_cast<uint16_t*>(out);
    const auto* words = reinterpret_cast<const uint32_t*>(pairs);
    for (int64_t c = 0; c < channels / 2; ++c, half += 2 * columns, words += columns)
#pragma omp simd
      for (int64_t i = 0; i < columns; ++i) {
        half[i] = static_cast<uint16_t>(words[i]);
        half[columns + i] = static_cast<uint16_t>(words[i] >> 16);
      }
  }
}

// Of one row and `size` hidden units: `raised` (gate, then value) becomes its own gradient and `dh`
// becomes w h; returns dh·h.
template <typename T, Nonlinearity act, bool GATED>
float hidden_backward(float* raised, float* dh, float weight, int64_t size) {
  float dweight = 0, *value = raised + size;
#pragma omp simd reduction(+ : dweight)
  for (int64_t j = 0; j < size; ++j) {
    const float x = raised[j], v = GATED ? value[j] : 1.0f, d = weight * dh[j], s = sigmoid<T>(x);
    const float active = act == RELU ? (x > 0 ? x : 0) : x * s;
    const float slope = act == RELU ? (x > 0 ? 1 : 0) : s * (1 + x * (1 - s));
    dweight += dh[j] * active * v;
    dh[j] = weight * active * v;
    raised[j] = d * slope * v;
    if (GATED) value[j] = d * active;
  }
  return dweight;
}

// What a thread needs for a block of rows, filled up with zeros, and some hidden units:
//   x, dy              [rows, D] gathered; *_columns the same turned, [D, rows]
//   up_columns         [D, width], up [width, D], down [D, units]: second operands
//   raised, dhidden    [COLUMNS, width] and [COLUMNS, units] in float32, turned into dr and w h
//   dr, weighed        [rows, width] and [rows, units]; *_packed are second operands
//   dx                 [rows, D] in float32: the sum over hidden units
//   sums               [D, width] and [D, units] in float32, of dW_upᵀ and dW_down, one after the
//                      other; of all hidden units where rows are several blocks
template <typename T>
struct ExpertScratch {
  Buffer<T> x, dy, x_columns, dy_columns, pairs, up_columns, up, down;
  Buffer<T> dr, dr_packed, weighed_packed;
  Buffer<float> raised, dhidden, dx, dweights, sums;

  explicit ExpertScratch(const ExpertSizes& z)
      : x(MOST_ROWS * z.dim), dy(MOST_ROWS * z.dim), x_columns(MOST_ROWS * z.dim),
        dy_columns(MOST_ROWS * z.dim), pairs(HALF<T> ? MOST_ROWS * z.dim : 0),
        up_columns(2 * CHUNK * z.dim), up(2 * CHUNK * z.dim), down(CHUNK * z.dim),
        dr(MOST_ROWS * 2 * CHUNK), dr_packed(HALF<T> ? MOST_ROWS * 2 * CHUNK : 0),
        weighed_packed(MOST_ROWS * CHUNK), raised(COLUMNS * 2 * CHUNK), dhidden(COLUMNS * CHUNK),
        dx(MOST_ROWS * z.dim), dweights(MOST_ROWS), sums((z.up + z.hidden) * z.dim) {}
};

template <typename T>
struct ExpertGradients {
  const Outputs<T>& dx;
  float* dweights;  // [parts, N·K]
  T *up, *down;
};

// Rounds the sums of `size` hidden units from f on into the gradients of the weights.
template <typename T>
void store_sums(
    const ExpertSizes& z, const float* sums, int64_t expert, int64_t f, int64_t size,
    const ExpertGradients<T>& out) {
  const int64_t width = z.gated() ? 2 * size : size;
  T* dup = out.up + expert * z.up * z.dim;
  T* ddown = out.down + expert * z.dim * z.hidden;
  float turned[2 * CHUNK * CHUNK];
  for (int64_t d = 0; d < z.dim; d += CHUNK) {
    const int64_t channels = std::min(CHUNK, z.dim - d);
    transpose_words(
        reinterpret_cast<uint32_t*>(turned), CHUNK,
        [&](int64_t i) { return reinterpret_cast<const uint32_t*>(sums + (d + i) * width); },
        channels, round_up(channels, LANES), width);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t row = i < size ? f + i : z.hidden + f + i - size;
      store(dup + row * z.dim + d, turned + i * CHUNK, channels);
    }
  }
  for (int64_t d = 0; d < z.dim; ++d)
    store(ddown + d * z.hidden + f, sums + z.dim * width + d * size, size);
}

// What a block of `count` rows says of `size` hidden units from f on. The part's `first` units
// start dx, and `fresh` rows start the sums over rows.
template <typename T, Nonlinearity act>
void hidden_units_backward(
    const ExpertSizes& z, const T* up, const T* down, const float* weights, const int32_t* places,
    int64_t count, int64_t f, int64_t size, bool first, bool fresh, ExpertScratch<T>& s,
    float* sums) {
  const int64_t width = z.gated() ? 2 * size : size, rows = filled_up<T>(count);
  const auto up_row = [&](int64_t i) {
    return up + (i < size ? f + i : z.hidden + f + i - size) * z.dim;
  };
  pack_transposed(s.up_columns.data(), up_row, width, width, z.dim);
  for (int64_t i = 0; i < width; i += size)
    pack(s.up.data() + i * z.dim, up_row(i), z.dim, size, size, z.dim);
  pack(s.down.data(), down + f, z.hidden, z.dim, z.dim, size);
  float *raised = s.raised.data(), *dhidden = s.dhidden.data();
  for (int64_t start = 0; start < rows; start += COLUMNS) {
    const int64_t n = std::min(COLUMNS, rows - start);
    multiply(
        n, width, z.dim, s.x.data() + start * z.dim, z.dim, s.up_columns.data(), width, raised,
        width, false);
    multiply(
        n, size, z.dim, s.dy.data() + start * z.dim, z.dim, s.down.data(), size, dhidden, size,
        false);
    for (int64_t r = 0; r < n; ++r) {
      const float weight = start + r < count ? weights[places[start + r]] : 0;
      const auto backward =
          z.gated() ? hidden_backward<T, act, true> : hidden_backward<T, act, false>;
      const float dweight = backward(raised + r * width, dhidden + r * size, weight, size);
      s.dweights[start + r] = first ? dweight : s.dweights[start + r] + dweight;
    }
    T* dr = s.dr.data() + start * width;
    store(dr, raised, n * width);
    if constexpr (HALF<T>) pack_rounded(s.dr_packed.data() + start * width, raised, n, width);
    pack_rounded(s.weighed_packed.data() + start * size, dhidden, n, size);
    multiply(
        n, z.dim, width, dr, width, s.up.data(), z.dim, s.dx.data() + start * z.dim, z.dim, !first);
  }
  const T* dr = HALF<T> ? s.dr_packed.data() : s.dr.data();
  for (int64_t d = 0; d < z.dim; d += CHUNK) {
    const int64_t channels = std::min(CHUNK, z.dim - d);
    multiply(
        channels, width, rows, s.x_columns.data() + d * rows, rows, dr, width, sums + d * width,
        width, !fresh);
    multiply(
        channels, size, rows, s.dy_columns.data() + d * rows, rows, s.weighed_packed.data(), size,
        sums + z.dim * width + d * size, size, !fresh);
  }
}

template <typename T, Nonlinearity act>
void hidden_part_backward(
    const ExpertSizes& z, const HiddenPart& own, const Tensor& dy, const Tensor& x,
    const Tensor& weights, const Tensor& up_proj, const Tensor& down_proj, const Choices& choices,
    ExpertScratch<T>& s, const ExpertGradients<T>& out) {
  const int64_t begin = choices.edges[own.expert], end = choices.edges[own.expert + 1];
  const T* up = up_proj.const_data_ptr<T>() + own.expert * z.up * z.dim;
  const T* down = down_proj.const_data_ptr<T>() + own.expert * z.dim * z.hidden;
  const int64_t blocks = (end - begin + MOST_ROWS - 1) / MOST_ROWS;
  const int64_t per_unit = z.dim * (z.up / z.hidden + 1);
  // Where all rows are one block, sums are rounded while they are in the caches.
  const auto each_chunk = [&](const auto& compute) {
    for (int64_t f = own.first; f < own.end; f += CHUNK)
      compute(
          f, std::min(CHUNK, own.end - f),
          s.sums.data() + (blocks > 1 ? (f - own.first) * per_unit : 0));
  };
  if (begin == end) {  // then it is one part
    std::fill_n(out.up + own.expert * z.up * z.dim, z.up * z.dim, T(0));
    std::fill_n(out.down + own.expert * z.dim * z.hidden, z.dim * z.hidden, T(0));
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t start = begin + i * (end - begin) / blocks;
    const int64_t count = begin + (i + 1) * (end - begin) / blocks - start;
    const int64_t rows = filled_up<T>(count);
    const int32_t* places = choices.places.data() + start;
    const auto gather = [&](T* to, T* columns, const Tensor& from) {
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(
            to + r * z.dim, from.const_data_ptr<T>() + places[r] / z.top_k * z.dim,
            z.dim * sizeof(T));
      std::memset(to + count * z.dim, 0, (rows - count) * z.dim * sizeof(T));
      transpose(columns, s.pairs.data(), to, rows, rows, z.dim);
    };
    gather(s.x.data(), s.x_columns.data(), x);
    gather(s.dy.data(), s.dy_columns.data(), dy);
    each_chunk([&](int64_t f, int64_t size, float* sums) {
      hidden_units_backward<T, act>(
          z, up, down, weights.const_data_ptr<float>(), places, count, f, size, f == own.first,
          i == 0, s, sums);
      if (i == blocks - 1) store_sums<T>(z, sums, own.expert, f, size, out);
    });
    for (int64_t r = 0; r < count; ++r) {
      store(out.dx.row(places[r], own.part), s.dx.data() + r * z.dim, z.dim);
      out.dweights[own.part * z.tokens * z.top_k + places[r]] = s.dweights[r];
    }
  }
}

template <typename T, Nonlinearity act>
std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weights, const Tensor& indices,
    const Tensor& up_proj, const Tensor& down_proj) {
  const ExpertSizes z(x, indices, up_proj, down_proj);
  const Choices choices(indices, z.experts);
  const auto parts = parts_of_experts(z, choices);
  const auto units = hidden_parts(z, choices, parts);
  const int64_t most_parts = *std::max_element(parts.begin(), parts.end());
  const Outputs<T> dx(z, x, most_parts);
  Tensor dparts = new_empty(weights, {most_parts, z.tokens, z.top_k});
  Tensor dweights = new_empty(weights, {z.tokens, z.top_k});
  Tensor dup = new_empty(up_proj, up_proj.sizes());
  Tensor ddown = new_empty(down_proj, down_proj.sizes());
  const ExpertGradients<T> out{
      dx, dparts.mutable_data_ptr<float>(), dup.mutable_data_ptr<T>(), ddown.mutable_data_ptr<T>()};
  share_out(static_cast<int64_t>(units.size()), [&] {
    return [&, s = ExpertScratch<T>(z)](int64_t i) mutable {
      hidden_part_backward<T, act>(
          z, units[i], dy, x, weights, up_proj, down_proj, choices, s, out);
    };
  });
  const auto parts_of = [&](int64_t expert) { return parts[expert]; };
  const int64_t* chosen = indices.const_data_ptr<int64_t>();
  float* sums = dweights.mutable_data_ptr<float>();
  for (int64_t i = 0; i < indices.numel(); ++i) {
    sums[i] = 0;
    for (int64_t p = 0; chosen[i] >= 0 && p < parts[chosen[i]]; ++p)
      sums[i] += out.dweights[p * indices.numel() + i];
  }
  return {sum_of_choices<T>(z, indices, dx, parts_of), dweights, dup, ddown};
}

}  // namespace headwise
