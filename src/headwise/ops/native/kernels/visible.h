// Which keys each row sees, and what is added to its scores.
//
// A row sees keys from `from` up to `end`: causality, sliding windows, documents and padding are such
// spans. Of a mask with holes between them, the steps of KEYS keys that it hides whole are known
// too, and within the others each key is looked up.
#pragma once

#include "attention.h"

namespace headwise {

struct Span {
  int64_t from, end;
  bool empty() const { return from >= end; }
  Span operator&(const Span& other) const {
    return {std::max(from, other.from), std::min(end, other.end)};
  }
  Span operator|(const Span& other) const {
    return {std::min(from, other.from), std::max(end, other.end)};
  }
};

// A tensor [B|1, H|1, T|1, S|1].
template <typename T>
struct Broadcast {
  const T* values = nullptr;
  int64_t sizes[4] = {}, strides[4] = {};

  explicit Broadcast(const std::optional<Tensor>& x) {
    if (!x) return;
    values = x->const_data_ptr<T>();
    for (int i = 0; i < 4; ++i)
      sizes[i] = x->size(i), strides[i] = sizes[i] == 1 ? 0 : x->stride(i);
  }
  const T* row(const Indices& i) const {
    return values + i.b * strides[0] + i.h * strides[1] + i.t * strides[2];
  }
  // The number of a row among those that differ.
  int64_t number(const Indices& i) const {
    const auto one_of = [&](int axis, int64_t i) { return sizes[axis] == 1 ? 0 : i; };
    return (one_of(0, i.b) * sizes[1] + one_of(1, i.h)) * sizes[2] + one_of(2, i.t);
  }
};

class Visible {
  const Sizes& z_;
  Broadcast<bool> mask_;
  Broadcast<float> bias_;
  const int32_t* spans_ = nullptr;  // [1, T, 2]
  // Of each row of the mask: where it begins and ends, whether something between is hidden, and
  // which steps have a key that is seen.
  std::vector<Span> mask_spans_;
  std::vector<uint8_t> holes_, steps_;

  void scan(int64_t number, const bool* seen) {
    const int64_t stride = mask_.strides[3];
    int64_t from = z_.keys, end = 0, count = 0;
    for (int64_t step = 0; step < z_.steps(); ++step) {
      const int64_t first = step * KEYS, last = std::min(first + KEYS, z_.keys);
      int64_t own = 0, j = first;
      // Eight at a time: a bool is a byte of 0 or 1.
      for (; stride == 1 && j + 8 <= last; j += 8) {
        uint64_t eight;
        std::memcpy(&eight, seen + j, sizeof eight);
        own += __builtin_popcountll(eight);
      }
      for (; j < last; ++j) own += seen[j * stride];
      if (own == 0) continue;
      steps_[number * z_.steps() + step] = 1;
      count += own;
      if (count == own)
        for (from = first; !seen[from * stride];) ++from;
      for (end = last; !seen[(end - 1) * stride];) --end;
    }
    mask_spans_[number] = {from, end};
    holes_[number] = count < end - from;
  }

 public:
  Visible(
      const Sizes& z, const Tensor& gate, const std::optional<Tensor>& spans,
      const std::optional<Tensor>& mask, const std::optional<Tensor>& bias)
      : z_(z), mask_(mask), bias_(bias) {
    if (spans) spans_ = spans->const_data_ptr<int32_t>();
    if (!mask) return;
    const int64_t heads = mask_.sizes[1], queries = mask_.sizes[2];
    const int64_t rows = mask_.sizes[0] * heads * queries;
    mask_spans_.resize(rows), holes_.resize(rows), steps_.resize(rows * z.steps());
    const float* gates = gate.const_data_ptr<float>();
    // Of a row that is one token's, tokens with every head off need not be looked at: padding.
    const bool of_tokens = mask_.sizes[0] == z.batch && queries == z.queries;
    const auto is_on = [&](int64_t b, int64_t t) {
      const float* own = gates + (b * z.queries + t) * z.heads;
      return std::any_of(own, own + z.heads, [](float x) { return x != 0; });
    };
    parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / queries / heads, t = i % queries;
        if (!of_tokens || is_on(b, t)) scan(i, mask_.row({b, i / queries % heads, t}));
      }
    });
  }

  Span of(const Indices& i) const {
    Span span{0, z_.causal ? std::min(z_.keys, i.t + z_.offset + 1) : z_.keys};
    if (spans_) span = span & Span{spans_[2 * i.t], spans_[2 * i.t + 1]};
    return mask_.values ? span & mask_spans_[mask_.number(i)] : span;
  }

  // Whether a row sees some of the keys from `first`, a multiple of KEYS, to first + KEYS.
  bool any(const Indices& i, int64_t first) const {
    return !mask_.values || steps_[mask_.number(i) * z_.steps() + first / KEYS];
  }

  // Whether a span says all there is to say of a row.
  bool plain(const Indices& i) const {
    return !bias_.values && (!mask_.values || !holes_[mask_.number(i)]);
  }

  // To the scores of keys from `first` to `last`, in s from s[0] on, `stride` apart: bias · factor;
  // -infinity in holes.
  void add(
      const Indices& i, int64_t first, int64_t last, float factor, float* s,
      int64_t stride = 1) const {
    if (bias_.values) {
      const float* bias = bias_.row(i);
      for (int64_t j = first; j < last; ++j)
        s[(j - first) * stride] += factor * bias[j * bias_.strides[3]];
    }
    if (mask_.values) {
      const bool* seen = mask_.row(i);
      for (int64_t j = first; j < last; ++j)
        if (!seen[j * mask_.strides[3]]) s[(j - first) * stride] = -INFINITY;
    }
  }
};

// The rows of a list that are on and see something, ascending, and all keys that one of them sees.
struct List {
  std::vector<int32_t> rows;
  Span span{INT64_MAX, 0};

  int64_t size() const { return static_cast<int64_t>(rows.size()); }
};

// The lists; the other rows of out [B, T, H, C] become 0.
template <typename T>
std::vector<List> lists_that_are_on(
    const Sizes& z, const Visible& visible, const float* gates, T* out) {
  std::vector<List> lists(z.lists());
  parallel_for(0, z.lists(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; ++list) {
      List& own = lists[list];
      const int64_t b = list / z.key_heads, h = list % z.key_heads * z.group;
      for (int64_t t = 0; t < z.queries; ++t)
        for (int64_t i = 0; i < z.group; ++i) {
          const int64_t place = z.place({b, h + i, t});
          const Span span = gates[place] == 0 ? Span{0, 0} : visible.of({b, h + i, t});
          if (span.empty()) {
            std::memset(static_cast<void*>(out + place * z.channels), 0, z.channels * sizeof(T));
            continue;
          }
          own.rows.push_back(static_cast<int32_t>(t * z.group + i));
          own.span = own.span | span;
        }
    }
  });
  return lists;
}

}  // namespace headwise
