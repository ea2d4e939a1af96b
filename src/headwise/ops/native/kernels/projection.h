// Projections into heads and out of them, for the tokens that have a head on. torch multiplies the
// first heads, which are on for all tokens, as one product. Each other head gathers its rows. Of one
// token, reading the weights is the cost: those of its heads are read, once.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "common.h"

namespace headwise {

constexpr int64_t PROJECTED = 64;  // rows of a block
constexpr int64_t SPAN = 256;  // tokens whose sums over heads a thread collects
constexpr int64_t OUTPUTS = 256;  // columns of one product of these
template <typename T>
constexpr int64_t READ_TOGETHER = HALF<T> ? 8 : 4;  // rows of a weight

inline Tensor part(Tensor of, int64_t axis, int64_t size) {
  return torch::stable::narrow(of, axis, 0, size);
}

// x Wᵀ + b by torch.
inline Tensor linear(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Tokens [N] of each head that are on, ascending; the first heads may be on everywhere.
struct HeadRows {
  int64_t tokens, heads, everywhere = 0;
  std::vector<std::vector<int32_t>> rows;

  // is_on(t * heads + h) for token t and head h.
  template <typename IsOn>
  HeadRows(int64_t tokens, int64_t heads, const IsOn& is_on)
      : tokens(tokens), heads(heads), rows(heads) {
    for (auto& own : rows) own.reserve(tokens);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h)
        if (is_on(t * heads + h)) rows[h].push_back(static_cast<int32_t>(t));
    while (everywhere < heads && static_cast<int64_t>(rows[everywhere].size()) == tokens)
      ++everywhere;
  }
  int64_t gathered() const { return heads - everywhere; }

  // Of one token: where the channels of its heads begin and end, adjacent heads as one.
  std::vector<std::array<int64_t, 2>> spans(int64_t channels) const {
    std::vector<std::array<int64_t, 2>> found;
    for (int64_t h = 0; h < heads; ++h) {
      if (rows[h].empty()) continue;
      if (found.empty() || found.back()[1] < h * channels) found.push_back({h * channels, 0});
      found.back()[1] = (h + 1) * channels;
    }
    return found;
  }
};

inline HeadRows gated_rows(const Tensor& gate) {
  const float* gates = gate.const_data_ptr<float>();
  return {gate.size(0), gate.size(1), [=](int64_t i) { return gates[i] != 0; }};
}

// A head that is off is 0, and adds nothing to the sum of the heads: heads [N, H, C], C even.
template <typename T>
HeadRows rows_that_add(const Tensor& heads) {
  const auto* words = reinterpret_cast<const uint32_t*>(heads.const_data_ptr<T>());
  const int64_t each = heads.size(2) * sizeof(T) / sizeof(uint32_t);
  return {heads.size(0), heads.size(1), [=](int64_t i) {
    const uint32_t* head = words + i * each;
    if (each && head[0]) return true;
    uint32_t bits = 0;
#pragma omp simd reduction(| : bits)
    for (int64_t j = 0; j < each; ++j) bits |= head[j];
    return bits != 0;
  }};
}

template <typename T>
Floats widened(const T* x) {
  Floats wide;
  if constexpr (HALF<T>) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    Halves half;
    std::memcpy(&half, x, sizeof half);
    const Words words = __builtin_convertvector(half, Words) << 16;
    std::memcpy(&wide, &words, sizeof wide);
  } else {
    std::memcpy(&wide, x, sizeof wide);
  }
  return wide;
}

// y[r] = b[r] + the sum of W[r, j] x[j] over the columns j in `spans`, for the rows r = row_of(i),
// i < count: x [1, columns], W [rows, columns], y [1, rows].
template <typename T, typename RowOf>
void multiply_token(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::vector<std::array<int64_t, 2>>& spans, int64_t count, const RowOf& row_of,
    Tensor& y) {
  constexpr int64_t TOGETHER = READ_TOGETHER<T>;
  const int64_t columns = weight.size(1);
  const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  const T* b = bias ? bias->const_data_ptr<T>() : nullptr;
  T* out = y.mutable_data_ptr<T>();
  parallel_for(0, (count + TOGETHER - 1) / TOGETHER, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t rows[TOGETHER];
      const T* own[TOGETHER];
      Floats sums[TOGETHER] = {};
      float rest[TOGETHER] = {};
      // The last row stands in where there are fewer.
      for (int64_t r = 0; r < TOGETHER; ++r) {
        rows[r] = row_of(std::min(i * TOGETHER + r, count - 1));
        own[r] = w + rows[r] * columns;
      }
      for (const auto [first, last] : spans) {
        int64_t j = first;
        for (; j + LANES <= last; j += LANES) {
          const Floats own_x = widened(in + j);
          for (int64_t r = 0; r < TOGETHER; ++r) {
            __builtin_prefetch(own[r] + TOGETHER * columns + j);  // the rows after these
            sums[r] += own_x * widened(own[r] + j);
          }
        }
        for (; j < last; ++j)
          for (int64_t r = 0; r < TOGETHER; ++r)
            rest[r] += static_cast<float>(in[j]) * static_cast<float>(own[r][j]);
      }
      for (int64_t r = 0; r < TOGETHER; ++r) {
        float sum = rest[r] + (b ? static_cast<float>(b[rows[r]]) : 0.0f);
        for (int64_t j = 0; j < LANES; ++j) sum += sums[r][j];
        store(out + rows[r], &sum, 1);
      }
    }
  });
}

// The weights of each gathered head as second operands, [rows, columns]; row_of(h, i) is where
// column i starts.
template <typename T, typename RowOf>
Tensor packed_heads(
    const HeadRows& z, const Tensor& weight, int64_t rows, int64_t columns, const RowOf& row_of) {
  const Tensor packed = new_empty(weight, {z.gathered(), rows, columns});
  T* out = packed.mutable_data_ptr<T>();
  parallel_for(0, z.gathered(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      pack_transposed(
          out + h * rows * columns, [&](int64_t i) { return row_of(z.everywhere + h, i); },
          columns, columns, rows);
  });
  return packed;
}

// q[n, h] = W_h x[n] + b_h where head h is on, 0 elsewhere: x [N, D], W [H·C, D], q [N, H·C].
template <typename T>
Tensor project_heads(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& gate) {
  const HeadRows z = gated_rows(gate);
  const int64_t dim = x.size(1), c = weight.size(0) / z.heads, shared = z.everywhere * c;
  Tensor q = new_zeros(x, {z.tokens, weight.size(0)});
  if (z.tokens == 1) {
    std::vector<int64_t> rows;
    for (const auto [first, last] : z.spans(c))
      for (int64_t row = first; row < last; ++row) rows.push_back(row);
    const auto count = static_cast<int64_t>(rows.size());
    multiply_token<T>(x, weight, bias, {{0, dim}}, count, [&](int64_t i) { return rows[i]; }, q);
    return q;
  }
  if (shared) {
    Tensor out = part(q, 1, shared);
    const auto own_bias = bias ? std::optional(part(*bias, 0, shared)) : std::nullopt;
    torch::stable::copy_(out, linear(x, part(weight, 0, shared), own_bias));
  }
  const T* weights = weight.const_data_ptr<T>();
  const Tensor packed = packed_heads<T>(
      z, weight, dim, c, [&](int64_t h, int64_t i) { return weights + (h * c + i) * dim; });
  std::vector<std::tuple<int64_t, int64_t>> blocks;
  for (int64_t h = z.everywhere; h < z.heads; ++h)
    for (size_t first = 0; first < z.rows[h].size(); first += PROJECTED)
      blocks.emplace_back(h, first);
  share_out(static_cast<int64_t>(blocks.size()), [&] {
    return [&, rows = Buffer<T>(PROJECTED * dim), out = Buffer<float>(PROJECTED * c)](
               int64_t i) mutable {
      const auto [h, first] = blocks[i];
      const int32_t* tokens = z.rows[h].data() + first;
      const int64_t count = std::min<int64_t>(PROJECTED, z.rows[h].size() - first);
      for (int64_t r = 0; r < count; ++r)
        std::copy_n(x.const_data_ptr<T>() + tokens[r] * dim, dim, rows.data() + r * dim);
      const T* w = packed.const_data_ptr<T>() + (h - z.everywhere) * dim * c;
      multiply(count, c, dim, rows.data(), dim, w, c, out.data(), c, false);
      const T* b = bias ? bias->const_data_ptr<T>() + h * c : nullptr;
      for (int64_t r = 0; r < count; ++r) {
        float* row = out.data() + r * c;
        for (int64_t j = 0; b && j < c; ++j) row[j] += static_cast<float>(b[j]);
        store(q.mutable_data_ptr<T>() + (tokens[r] * z.heads + h) * c, row, c);
      }
    };
  });
  return q;
}

// y[n] = sum of W_h heads[n, h] over the heads that are not 0, + b: heads [N, H, C], W [D, H·C].
template <typename T>
Tensor merge_heads(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias) {
  const HeadRows z = rows_that_add<T>(heads);
  const int64_t dim = weight.size(0), all = weight.size(1), c = heads.size(2);
  const int64_t shared = z.everywhere * c;
  if (z.tokens == 1) {
    Tensor y = new_empty(heads, {1, dim});
    multiply_token<T>(heads, weight, bias, z.spans(c), dim, [](int64_t i) { return i; }, y);
    return y;
  }
  const Tensor in = torch::stable::flatten(heads, 1, -1);
  Tensor y = linear(part(in, 1, shared), part(weight, 1, shared), bias);
  const T* weights = weight.const_data_ptr<T>();
  const Tensor packed = packed_heads<T>(
      z, weight, c, dim, [&](int64_t h, int64_t i) { return weights + i * all + h * c; });
  const int64_t span = std::clamp<int64_t>(z.tokens / num_threads(), PROJECTED, SPAN);
  share_out((z.tokens + span - 1) / span, [&] {
    return [&, sums = Buffer<float>(span * dim), rows = Buffer<T>(PROJECTED * c),
            out = Buffer<float>(PROJECTED * OUTPUTS)](int64_t i) mutable {
      const int64_t begin = i * span, end = std::min(z.tokens, begin + span);
      T* own = y.mutable_data_ptr<T>() + begin * dim;
      std::copy_n(own, (end - begin) * dim, sums.data());
      for (int64_t h = z.everywhere; h < z.heads; ++h) {
        const T* packed_head = packed.const_data_ptr<T>() + (h - z.everywhere) * c * dim;
        const auto last = std::lower_bound(z.rows[h].begin(), z.rows[h].end(), end);
        auto at = std::lower_bound(z.rows[h].begin(), last, begin);
        for (int64_t count; (count = std::min<int64_t>(PROJECTED, last - at)) > 0; at += count) {
          for (int64_t r = 0; r < count; ++r)
            std::copy_n(
                heads.const_data_ptr<T>() + at[r] * all + h * c, c, rows.data() + r * c);
          for (int64_t d = 0; d < dim; d += OUTPUTS) {
            const int64_t n = std::min(OUTPUTS, dim - d);
            multiply(
                count, n, c, rows.data(), c,
                packed_head + (HALF<T> ? 2 : 1) * d, dim, out.data(), OUTPUTS, false);
            for (int64_t r = 0; r < count; ++r) {
              float* sum = sums.data() + (at[r] - begin) * dim + d;
              for (int64_t j = 0; j < n; ++j) sum[j] += out[r * OUTPUTS + j];
            }
          }
        }
      }
      store(own, sums.data(), (end - begin) * dim);
    };
  });
  return y;
}

}  // namespace headwise
