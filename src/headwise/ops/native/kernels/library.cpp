// The kernels as operators of torch, CPU only. Matrix products are oneDNN's, through torch; bfloat16
// is multiplied as such and summed in float32.
#include <torch/library.h>

#include "attention_backward.h"
#include "attention_forward.h"
#include "decode.h"
#include "experts.h"

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

}  // namespace headwise

TORCH_LIBRARY(headwise_native, m) {
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
}

TORCH_LIBRARY_IMPL(headwise_native, CPU, m) {
  m.impl("attention", &headwise::attention);
  m.impl("attention_backward", &headwise::attention_backward);
  m.impl("decode_attention", &headwise::decode_attention);
  m.impl("expert_mlp", &headwise::expert_mlp);
}
