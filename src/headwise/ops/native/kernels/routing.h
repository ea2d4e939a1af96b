// Two-stage routing of heads with softmaxes (ops.route_heads), and its gradient; and, without one,
// routing with gates that are on or off: by the norms of queries (ops.route_heads_by_query_norm) and
// by scores (ops.route_heads_by_scores). A token at a time.
#pragma once

#include "common.h"

namespace headwise {

// Tokens of a thread at a time: so few that one thread does them do not wait for others.
constexpr int64_t TOKENS = 128;

// Logits [tokens, count]; the rows may be parts of longer ones.
struct Logits {
  const float* values;
  int64_t stride, count;
  explicit Logits(const Tensor& x)
      : values(x.const_data_ptr<float>()), stride(x.stride(0)), count(x.size(1)) {}
  const float* operator[](int64_t token) const { return values + token * stride; }
};

struct HeadLogits {
  Logits shared, routed, stage;
  int64_t top_k;
  bool paper;
  // Without one of the two kinds of heads there are no stages.
  bool staged() const { return shared.count > 0 && routed.count > 0; }
};

inline void softmax(const float* logits, int64_t count, float* out) {
  float most = -INFINITY, sum = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, logits[i]);
  for (int64_t i = 0; i < count; ++i) sum += out[i] = std::exp(logits[i] - most);
  for (int64_t i = 0; i < count; ++i) out[i] /= sum;
}

// The gradient dz from dp, where p = softmax(z).
inline void softmax_backward(const float* p, const float* dp, int64_t count, float* dz) {
  float mean = 0;
  for (int64_t i = 0; i < count; ++i) mean += p[i] * dp[i];
  for (int64_t i = 0; i < count; ++i) dz[i] = p[i] * (dp[i] - mean);
}

// The k largest, best first; of equal ones the first; what is no number is larger than any, as torch
// has it. `left` is scratch.
inline void best(const float* p, int64_t count, int64_t k, float* left, int64_t* indices) {
  std::copy_n(p, count, left);
  for (int64_t i = 0; i < k; ++i) {
    indices[i] = std::max_element(left, left + count, [](float a, float b) {
      return a < b || (std::isnan(b) && !std::isnan(a));
    }) - left;
    left[indices[i]] = -INFINITY;
  }
}

// The factors of a token's shared and routed scores, without those of the stages.
inline std::pair<float, float> scales(const HeadLogits& z, const float* p, const int64_t* chosen) {
  if (z.paper) return {1.0f, 1.0f};
  float sum = 0;
  for (int64_t i = 0; i < z.top_k; ++i) sum += p[chosen[i]];
  const float stages = z.staged() ? 2.0f : 1.0f;
  const float smallest = std::numeric_limits<float>::epsilon();
  return {stages * z.shared.count, stages * z.top_k / std::max(sum, smallest)};
}

inline void route(
    const HeadLogits& z, int64_t tokens, float* gates, int64_t* indices, float* probabilities) {
  const int64_t shared = z.shared.count, routed = z.routed.count;
  parallel_for(0, tokens, TOKENS, [&](int64_t begin, int64_t end) {
    std::vector<float> left(routed);
    for (int64_t t = begin; t < end; ++t) {
      float *gate = gates + t * (shared + routed), *p = probabilities + t * routed;
      int64_t* chosen = indices + t * z.top_k;
      float stage[2] = {1.0f, 1.0f};
      if (z.staged()) softmax(z.stage[t], 2, stage);
      softmax(z.shared[t], shared, gate);
      softmax(z.routed[t], routed, p);
      best(p, routed, z.top_k, left.data(), chosen);
      const auto [of_shared, of_routed] = scales(z, p, chosen);
      for (int64_t i = 0; i < shared; ++i) gate[i] *= stage[0] * of_shared;
      std::fill_n(gate + shared, routed, 0.0f);
      for (int64_t i = 0; i < z.top_k; ++i)
        gate[shared + chosen[i]] = stage[1] * of_routed * p[chosen[i]];
    }
  });
}

// Norms over their unbiased deviation; nothing but rounding is none.
inline void divide_by_deviation(const float* norms, int64_t count, float* out) {
  float sum = 0, squares = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) sum += norms[i], most = std::max(most, norms[i]);
  for (int64_t i = 0; i < count; ++i) {
    const float far = norms[i] - sum / count;
    squares += far * far;
  }
  const float deviation = std::sqrt(squares / (count - 1));
  const bool none = !(deviation > most * 4 * std::numeric_limits<float>::epsilon());
  for (int64_t i = 0; i < count; ++i) out[i] = norms[i] / (none ? 1 : deviation);
}

// The heads that `shared` has no bit for.
inline std::vector<int64_t> routed_heads(int64_t heads, int64_t shared) {
  std::vector<int64_t> routed;
  for (int64_t h = 0; h < heads; ++h)
    if (!(shared >> h & 1)) routed.push_back(h);
  return routed;
}

// Chooses the k best of the routed heads by their scores: their numbers among these, and gates of
// all heads, which are 0 for the others. `left` is scratch.
inline void switch_on(
    const float* scores, const std::vector<int64_t>& routed, int64_t heads, int64_t k, float* left,
    int64_t* chosen, float* gate) {
  best(scores, routed.size(), k, left, chosen);
  std::fill_n(gate, heads, 1.0f);
  for (const int64_t h : routed) gate[h] = 0;
  for (int64_t i = 0; i < k; ++i) gate[routed[chosen[i]]] = 1;
}

// Scores [tokens, routed]; of heads that are on, the gate is the gain, or 1 without.
inline void route_by_scores(
    const Logits& scores, int64_t tokens, const float* gain, int64_t heads, int64_t shared,
    int64_t top_k, float* gates, int64_t* indices, float* probabilities) {
  const std::vector<int64_t> routed = routed_heads(heads, shared);
  parallel_for(0, tokens, TOKENS, [&](int64_t begin, int64_t end) {
    std::vector<float> left(scores.count);
    for (int64_t t = begin; t < end; ++t) {
      float* gate = gates + t * heads;
      softmax(scores[t], scores.count, probabilities + t * scores.count);
      switch_on(scores[t], routed, heads, top_k, left.data(), indices + t * top_k, gate);
      if (gain)
        for (int64_t h = 0; h < heads; ++h) gate[h] *= gain[h];
    }
  });
}

// q [B, T, H, C], adjacent in C; `shared` has a bit for each shared head. Of the routed heads, of
// which one at least exists, the logits are the norms of their queries.
template <typename T>
void route_by_norms(
    const Tensor& q, int64_t shared, int64_t top_k, bool scaled, float* gates, int64_t* indices,
    float* probabilities, float* logits) {
  const int64_t length = q.size(1), heads = q.size(2), channels = q.size(3);
  const std::vector<int64_t> routed = routed_heads(heads, shared);
  const auto count = static_cast<int64_t>(routed.size());
  const T* queries = q.const_data_ptr<T>();
  parallel_for(0, q.size(0) * length, TOKENS, [&](int64_t begin, int64_t end) {
    std::vector<float> norms(count), left(count);
    for (int64_t t = begin; t < end; ++t) {
      const T* own = queries + t / length * q.stride(0) + t % length * q.stride(1);
      for (int64_t i = 0; i < count; ++i) {
        const T* row = own + routed[i] * q.stride(2);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < channels; ++c) {
          const float x = row[c];
          sum += x * x;
        }
        norms[i] = std::sqrt(sum);
      }
      float* z = logits + t * count;
      if (scaled && count > 1)
        divide_by_deviation(norms.data(), count, z);
      else
        std::copy_n(norms.data(), count, z);
      softmax(z, count, probabilities + t * count);
      switch_on(
          norms.data(), routed, heads, top_k, left.data(), indices + t * top_k, gates + t * heads);
    }
  });
}

// Gradients of the three logits, [tokens, count] each, from those of gates and probabilities.
inline void route_backward(
    const HeadLogits& z, int64_t tokens, const float* dgates, const float* dprobabilities,
    const int64_t* indices, float* dshared, float* drouted, float* dstages) {
  const int64_t shared = z.shared.count, routed = z.routed.count;
  parallel_for(0, tokens, TOKENS, [&](int64_t begin, int64_t end) {
    std::vector<float> s(shared), ds(shared), p(routed), dp(routed);
    for (int64_t t = begin; t < end; ++t) {
      const float *dgate = dgates + t * (shared + routed), *drest = dgate + shared;
      const int64_t* chosen = indices + t * z.top_k;
      float stage[2] = {1.0f, 1.0f}, dstage[2] = {0.0f, 0.0f};
      if (z.staged()) softmax(z.stage[t], 2, stage);
      softmax(z.shared[t], shared, s.data());
      softmax(z.routed[t], routed, p.data());
      const auto [of_shared, of_routed] = scales(z, p.data(), chosen);
      for (int64_t i = 0; i < shared; ++i) {
        dstage[0] += of_shared * s[i] * dgate[i];
        ds[i] = stage[0] * of_shared * dgate[i];
      }
      std::copy_n(dprobabilities + t * routed, routed, dp.data());
      for (int64_t i = 0; i < z.top_k; ++i)
        dstage[1] += of_routed * p[chosen[i]] * drest[chosen[i]];
      // The scores that are on are divided by their sum, so all of them matter to each.
      const float mean = z.paper || z.top_k == 0 ? 0.0f : dstage[1] / (z.staged() ? 2 : 1) / z.top_k;
      for (int64_t i = 0; i < z.top_k; ++i)
        dp[chosen[i]] += stage[1] * of_routed * (drest[chosen[i]] - mean);
      softmax_backward(s.data(), ds.data(), shared, dshared + t * shared);
      softmax_backward(p.data(), dp.data(), routed, drouted + t * routed);
      if (z.staged()) softmax_backward(stage, dstage, 2, dstages + t * 2);
    }
  });
}

}  // namespace headwise
