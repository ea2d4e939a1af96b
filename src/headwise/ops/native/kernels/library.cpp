// The kernels as operators of torch, for CPUs only. oneDNN multiplies matrices, through torch:
// products of bfloat16, sums of float32.
#include <torch/library.h>

#include "aggregated_backward.h"
#include "aggregated_forward.h"
#include "attention_backward.h"
#include "attention_forward.h"
#include "decode.h"
#include "experts.h"
#include "logits.h"
#include "projection.h"
#include "routing.h"

namespace headwise {

std::tuple<Tensor, Tensor> attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, bool causal,
    double scale) {
  Tensor y = at::zeros(q.sizes(), q.options()), lse;
  lse = at::zeros(gate.sizes(), gate.options().dtype(at::kDouble));
  if (q.scalar_type() == at::kFloat)
    forward<float>(q, k, v, gate, causal, scale, y, lse);
  else
    forward<BFloat16>(q, k, v, gate, causal, scale, y, lse);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dy, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate,
    const Tensor& y, const Tensor& lse, bool causal, double scale) {
  Tensor dq = at::zeros(q.sizes(), q.options()), dgate = at::zeros(gate.sizes(), gate.options());
  Tensor dk = at::zeros(k.sizes(), k.options()), dv = at::zeros(v.sizes(), v.options());
  const Operands x{dy, q, k, v, gate, y, lse, static_cast<float>(scale), dq, dgate};
  if (q.scalar_type() == at::kFloat)
    backward<float>(x, causal, dk, dv);
  else
    backward<BFloat16>(x, causal, dk, dv);
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
  if (q.scalar_type() == at::kFloat)
    of_type(float());
  else
    of_type(BFloat16());
}

Tensor aggregated_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_pool, const Tensor& v_pool,
    const Tensor& gate, const Tensor& local_bias, const Tensor& pool_bias, const Tensor& unit_q,
    const Tensor& learned_tokens, const Tensor& learned_bias, int64_t height, int64_t width,
    int64_t window) {
  const Map z(q, k_pool, height, width, window);
  const Tensor tokens = at::constant_pad_nd(learned_tokens, {0, z.near_columns - z.near});
  const MapInputs x{
      q, k, v, k_pool, v_pool, gate, local_bias, pool_bias, unit_q, tokens, learned_bias};
  Tensor y = at::zeros(q.sizes(), q.options());
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
  const Tensor tokens = at::constant_pad_nd(learned_tokens, {0, z.near_columns - z.near});
  const MapInputs x{
      q, k, v, k_pool, v_pool, gate, local_bias, pool_bias, unit_q, tokens, learned_bias};
  // So many parts that each thread has several to do.
  const int64_t parts = std::min(z.batch, (4 * at::get_num_threads() + z.heads - 1) / z.heads);
  const auto like = [](const Tensor& of) { return at::zeros(of.sizes(), of.options()); };
  const auto in_parts = [&](const Tensor& of) {
    std::vector<int64_t> sizes(of.sizes().begin(), of.sizes().end());
    sizes.insert(sizes.begin(), parts);
    return at::zeros(sizes, of.options().dtype(at::kFloat));
  };
  MapGradients out{
      like(q), like(k), like(v), like(k_pool), like(v_pool), like(gate), like(unit_q),
      in_parts(local_bias), in_parts(pool_bias), in_parts(learned_tokens), in_parts(learned_bias)};
  with_type_and_channels(q, [&](auto type, auto channels) {
    aggregate_backward<decltype(type), decltype(channels)::value>(z, x, dy, parts, out);
  });
  const auto whole = [](const Tensor& sums) { return sums.size(0) > 1 ? sums.sum(0) : sums[0]; };
  return {
      out.q, out.k, out.v, out.k_pool, out.v_pool, out.gate, whole(out.local_bias),
      whole(out.pool_bias), out.unit_q, whole(out.learned_tokens).to(q.scalar_type()),
      whole(out.learned_bias)};
}

Tensor decode_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gate, bool causal,
    double scale, const std::optional<Tensor>& mask) {
  const auto compute = q.scalar_type() == at::kFloat ? decode<float> : decode<BFloat16>;
  return compute(q, k, v, gate, causal, scale, mask);
}

Tensor expert_mlp(
    const Tensor& x, const Tensor& weights, const Tensor& indices, const Tensor& up,
    const Tensor& down, bool relu) {
  const bool half = x.scalar_type() == at::kBFloat16;
  const auto compute = half ? (relu ? experts<BFloat16, RELU> : experts<BFloat16, SILU>)
                            : (relu ? experts<float, RELU> : experts<float, SILU>);
  return compute(x, weights, indices, up, down);
}

Tensor projected(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& gate) {
  const bool half = x.scalar_type() == at::kBFloat16;
  return (half ? project_heads<BFloat16> : project_heads<float>)(x, weight, bias, gate);
}

Tensor merged(
    const Tensor& heads, const Tensor& weight, const std::optional<Tensor>& bias,
    const Tensor& gate) {
  const bool half = heads.scalar_type() == at::kBFloat16;
  return (half ? merge_heads<BFloat16> : merge_heads<float>)(heads, weight, bias, gate);
}

Tensor logits(const Tensor& x, const Tensor& weight) {
  Tensor y = at::empty({x.size(0), round_up(weight.size(0), LANES)}, x.options().dtype(at::kFloat));
  wide_product(x, weight, y);
  return y.narrow(1, 0, weight.size(0)).contiguous();
}

std::tuple<Tensor, Tensor, Tensor> route_heads(
    const Tensor& shared, const Tensor& routed, const Tensor& stage, int64_t top_k, bool paper) {
  const HeadLogits z{Logits(shared), Logits(routed), Logits(stage), top_k, paper};
  const int64_t tokens = shared.size(0);
  Tensor gates = at::empty({tokens, z.shared.count + z.routed.count}, shared.options());
  Tensor indices = at::empty({tokens, top_k}, shared.options().dtype(at::kLong));
  Tensor probabilities = at::empty({tokens, z.routed.count}, shared.options());
  route(
      z, tokens, gates.mutable_data_ptr<float>(), indices.mutable_data_ptr<int64_t>(),
      probabilities.mutable_data_ptr<float>());
  return {gates, indices, probabilities};
}

std::tuple<Tensor, Tensor, Tensor> route_heads_backward(
    const Tensor& gates, const Tensor& probabilities, const Tensor& shared, const Tensor& routed,
    const Tensor& stage, const Tensor& indices, bool paper) {
  const HeadLogits z{Logits(shared), Logits(routed), Logits(stage), indices.size(1), paper};
  const auto like = [](const Tensor& of) { return at::zeros(of.sizes(), of.options()); };
  Tensor dshared = like(shared), drouted = like(routed), dstage = like(stage);
  route_backward(
      z, shared.size(0), gates.const_data_ptr<float>(), probabilities.const_data_ptr<float>(),
      indices.const_data_ptr<int64_t>(), dshared.mutable_data_ptr<float>(),
      drouted.mutable_data_ptr<float>(), dstage.mutable_data_ptr<float>());
  return {dshared, drouted, dstage};
}

}  // namespace headwise

TORCH_LIBRARY(headwise_native, m) {
  m.def(
      "aggregated_attention(Tensor q, Tensor k, Tensor v, Tensor k_pool, Tensor v_pool, "
      "Tensor gate, Tensor local_bias, Tensor pool_bias, Tensor unit_q, Tensor learned_tokens, "
      "Tensor learned_bias, int height, int width, int window) -> Tensor");
  m.def(
      "aggregated_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor k_pool, "
      "Tensor v_pool, Tensor gate, Tensor local_bias, Tensor pool_bias, Tensor unit_q, "
      "Tensor learned_tokens, Tensor learned_bias, int height, int width, int window) -> Tensor[]");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, float scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor y, "
      "Tensor lse, bool causal, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, float scale, "
      "Tensor? mask) -> Tensor");
  m.def(
      "expert_mlp(Tensor x, Tensor weights, Tensor indices, Tensor up, Tensor down, bool relu) -> "
      "Tensor");
  m.def("logits(Tensor x, Tensor weight) -> Tensor");
  m.def("merge_heads(Tensor heads, Tensor weight, Tensor? bias, Tensor gate) -> Tensor");
  m.def("project_heads(Tensor x, Tensor weight, Tensor? bias, Tensor gate) -> Tensor");
  m.def(
      "route_heads(Tensor shared, Tensor routed, Tensor stage, int top_k, bool paper) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "route_heads_backward(Tensor gates, Tensor probabilities, Tensor shared, Tensor routed, "
      "Tensor stage, Tensor indices, bool paper) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(headwise_native, CPU, m) {
  m.impl("aggregated_attention", &headwise::aggregated_attention);
  m.impl("aggregated_attention_backward", &headwise::aggregated_attention_backward);
  m.impl("attention", &headwise::attention);
  m.impl("attention_backward", &headwise::attention_backward);
  m.impl("decode_attention", &headwise::decode_attention);
  m.impl("expert_mlp", &headwise::expert_mlp);
  m.impl("logits", &headwise::logits);
  m.impl("merge_heads", &headwise::merged);
  m.impl("project_heads", &headwise::projected);
  m.impl("route_heads", &headwise::route_heads);
  m.impl("route_heads_backward", &headwise::route_heads_backward);
}
