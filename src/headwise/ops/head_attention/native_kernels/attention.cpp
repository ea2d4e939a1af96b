// Attention of the heads that are on, for CPUs: FlashAttention's tiling over gathered queries.
//
// A row is a query token under one of the query heads that share a key head; every (batch, key
// head) has a list of the rows that are on, ascending. Blocks of a list are computed side by side.
// Matrix products are oneDNN's, through torch; bfloat16 is multiplied as such and summed in float32.
//
// Sources: MoH, arXiv 2410.11842, Eq. 4; FlashAttention, arXiv 2205.14135 and 2307.08691.
#include <torch/library.h>

#include "backward.h"
#include "forward.h"

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

}  // namespace headwise

TORCH_LIBRARY(headwise_native, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, float scale) -> "
      "(Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor gate, Tensor y, "
      "Tensor lse, bool causal, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(headwise_native, CPU, m) {
  m.impl("attention", &headwise::attention);
  m.impl("attention_backward", &headwise::attention_backward);
}
