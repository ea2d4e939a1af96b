// Logits of a router: x Wᵀ [tokens, rows of W] of bfloat16, summed and kept in float32.
#pragma once

#include "common.h"

namespace headwise {

constexpr int64_t SCORED = 128;  // tokens of one product

inline void wide_product(const Tensor& x, const Tensor& weight, Tensor& y) {
  const int64_t tokens = x.size(0), dim = x.size(1), columns = y.size(1);
  const auto* weights = weight.const_data_ptr<BFloat16>();
  const auto* rows = x.const_data_ptr<BFloat16>();
  float* out = y.mutable_data_ptr<float>();
  Buffer<BFloat16> packed(dim * columns);
  pack_transposed(
      packed.data(), [&](int64_t i) { return weights + i * dim; }, columns, columns, dim);
  share_out((tokens + SCORED - 1) / SCORED, [&] {
    return [&](int64_t i) {
      const int64_t begin = i * SCORED, count = std::min(SCORED, tokens - begin);
      multiply(
          count, columns, dim, rows + begin * dim, dim, packed.data(), columns,
          out + begin * columns, columns, false);
    };
  });
}

}  // namespace headwise
