// The kernels as operators of torch, for CPUs only, through torch's stable interface: what is built
// beside one torch runs beside later ones. The Python wrappers check shapes and dtypes.
#include <torch/csrc/stable/library.h>

#include "aggregated_backward.h"
#include "aggregated_forward.h"
#include "attention_backward.h"
#include "attention_forward.h"
#include "decode.h"
#include "experts.h"
#include "experts_backward.h"
#include "logits.h"
#include "projection.h"
#include "routing.h"

namespace headwise {

Tensor zeros_like(const Tensor& x) { return new_zeros(x, x.sizes()); }
bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }
using Maybe = std::optional<Tensor>;

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, bool causal,
    double scale, const Maybe& spans, const Maybe& mask, const Maybe& bias) {
  const Sizes z(q, k, causal);
  const Visible visible(z, gate, spans, mask, bias);
  Tensor y = new_empty(q, q.sizes()), lse = new_zeros(gate, gate.sizes(), ScalarType::Double);
  const auto compute = is_half(q) ? forward<BFloat16> : forward<float>;
  compute(z, visible, q, k, v, gate, static_cast<float>(scale), y, lse);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
    const Tensor& y, const Tensor& lse, bool causal, double scale, const Maybe& spans,
    const Maybe& mask, const Maybe& bias) {
  const Sizes z(q, k, causal);
  const Visible visible(z, gate, spans, mask, bias);
  Tensor dq = new_empty(q, q.sizes()), dk = zeros_like(k), dv = zeros_like(v);
  Tensor dgate = zeros_like(gate);
  const Operands x{dy, q, k, v, gate, y, lse, static_cast<float>(scale), dq, dgate};
  const auto compute = is_half(q) ? backward<BFloat16> : backward<float>;
  compute(z, visible, x, dk, dv);
  return {dq, dk, dv, dgate};
}

// Calls compute(type, channels) with types that know 24 channels, as all of TransNeXt's stages have.
template <typename Compute>
void with_type_and_channels(const Tensor& q, const Compute& compute) {
  const auto of_type = [&](auto type) {
    if (q.size(3) == 24)
      compute(type, std::integral_constant<int64_t, 24>());
    else
      compute(type, std::integral_constant<int64_t, 0>());
  };
  if (is_half(q))
    of_type(BFloat16());
  else
    of_type(float());
}

Tensor aggregated_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool,
    const Tensor& gate, const Tensor& local_bias, const Tensor& pool_bias, const Tensor& unit_q,
    const Tensor& learned_tokens, const Tensor& learned_bias, int64_t height, int64_t width,
    int64_t window) {
  const Map z(q, k_pool, height, width, window);
  const Tensor tokens = torch::stable::pad(learned_tokens, {0, z.near_columns - z.near});
  const MapInputs x{
      q, k, v, k_pool, v_pool, gate, local_bias, pool_bias, unit_q, tokens, learned_bias};
  Tensor y = zeros_like(q);
  with_type_and_channels(q, [&](auto type, auto channels) {
    aggregate<decltype(type), decltype(channels)::value>(z, x, y);
  });
  return y;
}

std::vector<Tensor> aggregated_attention_backward(
    const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool,
    const Tensor& v_pool, const Tensor& gate, const Tensor& local_bias, const Tensor& pool_bias,
    const Tensor& unit_q, const Tensor& learned_tokens, const Tensor& learned_bias, int64_t height,
    int64_t width, int64_t window) {
  const Map z(q, k_pool, height, width, window);
  const Tensor tokens = torch::stable::pad(learned_tokens, {0, z.near_columns - z.near});
  const MapInputs x{
      q, k, v, k_pool, v_pool, gate, local_bias, pool_bias, unit_q, tokens, learned_bias};
  // So many parts that each thread has several to do.
  const int64_t parts = std::min(z.batch, (4 * num_threads() + z.heads - 1) / z.heads);
  const auto in_parts = [&](const Tensor& of) {
    std::vector<int64_t> sizes(of.sizes().begin(), of.sizes().end());
    sizes.insert(sizes.begin(), parts);
    return new_zeros(of, sizes, ScalarType::Float);
  };
  MapGradients out{
      zeros_like(q), zeros_like(k), zeros_like(v), zeros_like(k_pool), zeros_like(v_pool),
      zeros_like(gate), zeros_like(unit_q),
      in_parts(local_bias), in_parts(pool_bias), in_parts(learned_tokens), in_parts(learned_bias)};
  with_type_and_channels(q, [&](auto type, auto channels) {
    aggregate_backward<decltype(type), decltype(channels)::value>(z, x, dy, parts, out);
  });
  const auto whole = [](const Tensor& sums) {
    return sums.size(0) > 1 ? torch::stable::sum(sums, std::vector<int64_t>{0})
                            : torch::stable::select(sums, 0, 0);
  };
  return {
      out.q, out.k, out.v, out.k_pool, out.v_pool, out.gate, whole(out.local_bias),
      whole(out.pool_bias), out.unit_q, torch::stable::to(whole(out.learned_tokens), q.scalar_type()),
      whole(out.learned_bias)};
}

Tensor decode_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, bool causal,
    double scale, const Maybe& spans, const Maybe& mask, const Maybe& bias, const Maybe& places) {
  Sizes z(q, k, causal);
  if (places) z.keys = places->size(0), z.offset = z.keys - z.queries;
  const Visible visible(z, gate, spans, mask, bias);
  Tensor y = new_empty(q, q.sizes());
  const auto compute = is_half(q) ? decode<BFloat16> : decode<float>;
  const int64_t* of_keys = places ? places->const_data_ptr<int64_t>() : nullptr;
  compute(z, visible, q, k, v, gate, of_keys, static_cast<float>(scale), y);
  return y;
}

Tensor expert_mlp(
    const Tensor& x, const Tensor& weights, const Tensor& indices, const Tensor& up,
    const Tensor& down, bool relu) {
  const bool half = is_half(x);
  const auto compute = half ? (relu ? experts<BFloat16, RELU> : experts<BFloat16, SILU>)
                            : (relu ? experts<float, RELU> : experts<float, SILU>);
  return compute(x, weights, indices, up, down);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weights, const Tensor& indices,
    const Tensor& up, const Tensor& down, bool relu) {
  const bool half = is_half(x);
  const auto compute =
      half ? (relu ? experts_backward<BFloat16, RELU> : experts_backward<BFloat16, SILU>)
           : (relu ? experts_backward<float, RELU> : experts_backward<float, SILU>);
  return compute(dy, x, weights, indices, up, down);
}

Tensor projected(
    const Tensor& x, const Tensor& weight, const Maybe& bias, const Tensor& gate) {
  const bool half = is_half(x);
  return (half ? project_heads<BFloat16> : project_heads<float>)(x, weight, bias, gate);
}

Tensor merged(const Tensor& heads, const Tensor& weight, const Maybe& bias) {
  const bool half = is_half(heads);
  return (half ? merge_heads<BFloat16> : merge_heads<float>)(heads, weight, bias);
}

Tensor logits(const Tensor& x, const Tensor& weight) {
  Tensor y = new_empty(x, {x.size(0), weight.size(0)}, ScalarType::Float);
  wide_product(x, weight, y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> route_heads(
    const Tensor& shared, const Tensor& routed, const Tensor& stage, int64_t top_k, bool paper) {
  const HeadLogits z{Logits(shared), Logits(routed), Logits(stage), top_k, paper};
  const int64_t tokens = shared.size(0);
  Tensor gates = new_empty(shared, {tokens, z.shared.count + z.routed.count});
  Tensor indices = new_empty(shared, {tokens, top_k}, ScalarType::Long);
  Tensor probabilities = new_empty(shared, {tokens, z.routed.count});
  route(
      z, tokens, gates.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
      probabilities.mutable_data_ptr<float>());
  return {gates, indices, probabilities};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route_heads_by_query_norm(
    const Tensor& q, int64_t shared, int64_t top_k, bool scaled) {
  int64_t routed = q.size(2);
  for (int64_t left = shared; left; left &= left - 1) --routed;
  const auto for_each = [&](int64_t count, ScalarType type) {
    return new_empty(q, {q.size(0), q.size(1), count}, type);
  };
  Tensor gates = for_each(q.size(2), ScalarType::Float), indices = for_each(top_k, ScalarType::Long);
  Tensor probabilities = for_each(routed, ScalarType::Float);
  Tensor logits = for_each(routed, ScalarType::Float);
  (is_half(q) ? route_by_norms<BFloat16> : route_by_norms<float>)(
      q, shared, top_k, scaled, gates.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
      probabilities.mutable_data_ptr<float>(), logits.mutable_data_ptr<float>());
  return {gates, indices, probabilities, logits};
}

std::tuple<Tensor, Tensor, Tensor> route_heads_by_scores(
    const Tensor& scores, const std::optional<Tensor>& gain, int64_t heads, int64_t shared,
    int64_t top_k) {
  const Logits z(scores);
  const int64_t tokens = scores.size(0);
  Tensor gates = new_empty(scores, {tokens, heads});
  Tensor indices = new_empty(scores, {tokens, top_k}, ScalarType::Long);
  Tensor probabilities = new_empty(scores, {tokens, z.count});
  route_by_scores(
      z, tokens, gain ? gain->const_data_ptr<float>() : nullptr, heads, shared, top_k,
      gates.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
      probabilities.mutable_data_ptr<float>());
  return {gates, indices, probabilities};
}

std::tuple<Tensor, Tensor, Tensor> route_heads_backward(
    const Tensor& gates, const Tensor& probabilities, const Tensor& shared, const Tensor& routed,
    const Tensor& stage, const Tensor& indices, bool paper) {
  const HeadLogits z{Logits(shared), Logits(routed), Logits(stage), indices.size(1), paper};
  Tensor dshared = zeros_like(shared), drouted = zeros_like(routed), dstage = zeros_like(stage);
  route_backward(
      z, shared.size(0), gates.const_data_ptr<float>(), probabilities.const_data_ptr<float>(),
      indices.const_data_ptr<int64_t>(), dshared.mutable_data_ptr<float>(),
      drouted.mutable_data_ptr<float>(), dstage.mutable_data_ptr<float>());
  return {dshared, drouted, dstage};
}

}  // namespace headwise

STABLE_TORCH_LIBRARY(headwise_native, m) {
  m.def(
      "aggregated_attention(Tensor q, Tensor k, Tensor v, Tensor k_pool, Tensor v_pool, "
      "Tensor gate, Tensor local_bias, Tensor pool_bias, Tensor unit_q, Tensor learned_tokens, "
      "Tensor learned_bias, int height, int width, int window) -> Tensor");
  m.def(
      "aggregated_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor k_pool, "
      "Tensor v_pool, Tensor gate, Tensor local_bias, Tensor pool_bias, Tensor unit_q, "
      "Tensor learned_tokens, Tensor learned_bias, int height, int width, int window) -> Tensor[]");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, float scale, "
      "Tensor? spans, Tensor? mask, Tensor? bias) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor y, "
      "Tensor lse, bool causal, float scale, Tensor? spans, Tensor? mask, Tensor? bias) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, float scale, "
      "Tensor? spans, Tensor? mask, Tensor? bias, Tensor? places) -> Tensor");
  m.def(
      "expert_mlp(Tensor x, Tensor weights, Tensor indices, Tensor up, Tensor down, bool relu) -> "
      "Tensor");
  m.def(
      "expert_mlp_backward(Tensor dy, Tensor x, Tensor weights, Tensor indices, Tensor up, "
      "Tensor down, bool relu) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("logits(Tensor x, Tensor weight) -> Tensor");
  m.def("merge_heads(Tensor heads, Tensor weight, Tensor? bias) -> Tensor");
  m.def("project_heads(Tensor x, Tensor weight, Tensor? bias, Tensor gate) -> Tensor");
  m.def(
      "route_heads(Tensor shared, Tensor routed, Tensor stage, int top_k, bool paper) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "route_heads_by_query_norm(Tensor q, int shared, int top_k, bool scaled) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "route_heads_by_scores(Tensor scores, Tensor? gain, int heads, int shared, int top_k) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "route_heads_backward(Tensor gates, Tensor probabilities, Tensor shared, Tensor routed, "
      "Tensor stage, Tensor indices, bool paper) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(headwise_native, CPU, m) {
  m.impl("aggregated_attention", TORCH_BOX(&headwise::aggregated_attention));
  m.impl("aggregated_attention_backward", TORCH_BOX(&headwise::aggregated_attention_backward));
  m.impl("attention", TORCH_BOX(&headwise::attention));
  m.impl("attention_backward", TORCH_BOX(&headwise::attention_backward));
  m.impl("decode_attention", TORCH_BOX(&headwise::decode_attention));
  m.impl("expert_mlp", TORCH_BOX(&headwise::expert_mlp));
  m.impl("expert_mlp_backward", TORCH_BOX(&headwise::expert_mlp_backward));
  m.impl("logits", TORCH_BOX(&headwise::logits));
  m.impl("merge_heads", TORCH_BOX(&headwise::merged));
  m.impl("project_heads", TORCH_BOX(&headwise::projected));
  m.impl("route_heads", TORCH_BOX(&headwise::route_heads));
  m.impl("route_heads_by_query_norm", TORCH_BOX(&headwise::route_heads_by_query_norm));
  m.impl("route_heads_by_scores", TORCH_BOX(&headwise::route_heads_by_scores));
  m.impl("route_heads_backward", TORCH_BOX(&headwise::route_heads_backward));
}
