// What both passes of attention share: FlashAttention's tiling over gathered queries.
//
// A row is a query token under one of the query heads that share a key head: row t * group + i is
// token t under the i-th of them. Every (batch entry, key head) has a list of the rows that are on,
// ascending. Blocks of ROWS rows of a list are computed by different threads.
//
// Sources: MoH, arXiv 2410.11842, Eq. 4; FlashAttention, arXiv 2205.14135 and 2307.08691.
#pragma once

#include "common.h"

namespace headwise {

constexpr int64_t ROWS = 64;  // of a block
constexpr int64_t KEYS = 256;  // of a step
constexpr int64_t KEY_MULTIPLE = 64;

struct Indices {
  int64_t b, h, t;
};

struct Sizes {
  int64_t batch, queries, heads, channels, keys, key_heads, group, offset;
  bool causal;

  Sizes(const Tensor& q, const Tensor& k, bool causal)
      : batch(q.size(0)), queries(q.size(1)), heads(q.size(2)), channels(q.size(3)),
        keys(k.size(1)), key_heads(k.size(2)), group(heads / key_heads), offset(keys - queries),
        causal(causal) {}

  int64_t lists() const { return batch * key_heads; }
  int64_t steps() const { return (keys + KEYS - 1) / KEYS; }
  Indices indices(int64_t list, int32_t row) const {
    return {list / key_heads, list % key_heads * group + row % group, row / group};
  }
  // Where a row stands in [B, T, H].
  int64_t place(const Indices& i) const { return (i.b * queries + i.t) * heads + i.h; }
};

// Keys or values [B, S, Hkv, C] of one list.
template <typename T>
const T* of_list(const Tensor& x, const Sizes& z, int64_t list) {
  return x.const_data_ptr<T>() + list / z.key_heads * x.stride(0) + list % z.key_heads * x.stride(2);
}

}  // namespace headwise
