"""Plain attention with the log-sum-exp of the scores, by which results over more keys are merged.

`Operands` are what every implementation of `head_attention` computes. `attend` takes some rows
[b, h, n, C] to some keys [b, h, s, C], `attend_all` all heads of all tokens, times their gates. On
CPUs torch's own flash kernels do the work (bfloat16 products, float32 sums); elsewhere matrix
products and a softmax do.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.ops.dtypes import wide_dtype, widened
from headwise.ops.gradients import differentiable_gradients
from headwise.ops.tensors import adjacent

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Operands(NamedTuple):
    """The arguments of `head_attention`, checked: every implementation computes these.

    Mask and bias are [B|1, H|1, T|1, S|1]; the scale is above 0.
    """

    q: Float[Tensor, "B T H C"]
    k: Float[Tensor, "B S Hkv C"]
    v: Float[Tensor, "B S Hkv C"]
    gate: Float[Tensor, "B T H"]
    causal: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0


# The same, as the schema of a custom operator has them.
OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, Tensor? mask, Tensor? bias, "
    "float scale"
)


class Gradients(NamedTuple):
    """What some rows and keys add to the gradients; `scores` [b, h, n, s] only where asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    added: Tensor | None,
    causal: bool = False,
    scale: float,
    blind: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp [b, h, n]; 0 and -inf for a row that sees no key.

    Such rows exist only if `blind` and something is added: `added` [b, h, n, s], to the scores.
    `causal` lets row i see keys 0..i.
    """
    if q.device.type == "cpu":
        # torch's kernel takes channels to lie side by side, and does not check it.
        q, k, v = map(adjacent, (q, k, v))
        out, lse = _flash(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
    else:
        scores = _scores(q, k, added, causal, scale)
        lse = scores.logsumexp(-1)
        out = (scores - _finite(lse).unsqueeze(-1)).exp().to(v.dtype) @ v
    if blind and added is not None:
        # The kernel reports 0 for a row without keys.
        lse = lse.masked_fill(added.amax(-1) == float("-inf"), float("-inf"))
    return out, lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    added: Tensor | None,
    causal: bool = False,
    scale: float,
    scores_gradient: bool,
) -> Gradients:
    """Gradients of `attend`, given the output and log-sum-exp of the rows over *all* keys."""
    lse = _finite(lse)
    if q.device.type == "cpu" and not scores_gradient:
        dout, q, k, v, out = map(adjacent, (dout, q, k, v, out))
        return Gradients(
            *_flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale)
        )
    p = (_scores(q, k, added, causal, scale) - lse.unsqueeze(-1)).exp()
    delta = (dout.to(p.dtype) * out.to(p.dtype)).sum(-1, keepdim=True)
    ds = p * ((dout @ v.mT).to(p.dtype) - delta)
    down = (ds * scale).to(q.dtype)
    return Gradients(down @ k, down.mT @ q, p.to(q.dtype).mT @ dout, ds)


def added_to_scores(x: Operands) -> Tensor | None:
    """Mask, bias and causality as one tensor to add."""
    q, k, _, _, causal, mask, bias, _ = x
    # One query sees every key.
    if causal and q.shape[1] > 1:
        lower = lower_triangle(q, k)
        mask = lower if mask is None else mask & lower
    if mask is None:
        return None if bias is None else bias.to(q.dtype)
    added = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias.to(q.dtype)
    return torch.where(mask, added, float("-inf"))


def lower_triangle(q: Tensor, k: Tensor) -> Tensor:
    """True where a key may be seen, [1, 1, T, S]: the last query sees them all."""
    queries, keys = q.shape[1], k.shape[1]
    whole = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    return whole.tril(keys - queries)


def _scores(q: Tensor, k: Tensor, added: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = widened(q @ k.mT) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores if added is None else scores + added


def _finite(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == float("-inf"), 0)


def attend_all(x: Operands) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C] and the log-sum-exp of the scores [B, T, H], of heads that are off, too."""
    q, k, v, added, square = _all_heads(x)
    out, lse = attend(q, k, v, added=added, causal=square, scale=x.scale)
    y = out.transpose(1, 2) * x.gate.to(q.dtype).unsqueeze(-1)
    return y, lse.transpose(1, 2).contiguous()


def attend_all_backward(
    dy: Tensor, x: Operands, y: Tensor, lse: Tensor, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate and bias (empty unless `needs_bias`)."""
    q, k, v, added, square = _all_heads(x)
    dout, out, dgate = before_the_gates(dy, y, x.gate.to(wide_dtype(q)))
    dout, out, lse = (of_rows.transpose(1, 2) for of_rows in (dout, out, lse))
    part = attend_backward(
        dout, q, k, v, out, lse,
        added=added, causal=square, scale=x.scale, scores_gradient=needs_bias,
    )  # fmt: skip
    dq = part.q.transpose(1, 2).contiguous()
    dk, dv = (
        of_heads.unflatten(1, (x.k.shape[2], -1)).sum(2).transpose(1, 2).contiguous()
        for of_heads in part[1:3]
    )
    dbias = q.new_empty(0)
    if needs_bias and x.bias is not None and part.scores is not None:
        dbias = part.scores.sum_to_size(x.bias.shape)
    return dq, dk, dv, dgate.to(x.gate.dtype), dbias


def before_the_gates(dy: Tensor, y: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What y = gate · out, [..., C], says of out [..., C] and of the gates [...].

        dout = gate · dy,   out = y / gate,   dgate = dy · out = dout · out / gate

    A gate of 0 gets no gradient and gives none. Gates are float32 or wider, and so is dgate.
    """
    gates = gates.unsqueeze(-1)
    safe = torch.where(gates == 0, 1, gates)
    dout, out = (dy * gates).to(dy.dtype), (y / safe).to(y.dtype)
    return dout, out, (dout * out).sum(-1, dtype=gates.dtype) / safe.squeeze(-1)


def differentiable_attention_gradients(
    dy: Tensor, x: Operands, spans: Tensor | None = None
) -> list[Tensor | None]:
    """Gradients of q, k, v, gate and bias that have gradients themselves: all heads are computed.

    Spans [1, T, 2] are what is seen, as well.
    """
    if spans is not None:
        seen = mask_of(spans, x.k.shape[1])
        x = x._replace(mask=seen if x.mask is None else seen & x.mask)

    def again(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
        heads = x._replace(q=q, k=k, v=v, gate=gate, bias=bias)
        q, k, v, added, square = _all_heads(heads)
        scores = _scores(q, k, added, square, x.scale)
        # A row that sees no key says 0.
        blind = scores.detach().amax(-1, keepdim=True) == float("-inf")
        p = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        y = (p.to(v.dtype) @ v).transpose(1, 2) * gate.to(v.dtype).unsqueeze(-1)
        return torch.where((gate == 0).unsqueeze(-1), 0, y)

    return differentiable_gradients(again, (*x[:4], x.bias), (dy,))


def mask_of(spans: Int[Tensor, "1 T 2"], keys: int) -> Bool[Tensor, "1 1 T S"]:
    """True where a key lies in a query's span."""
    key = torch.arange(keys, device=spans.device)
    begin, end = spans[:, None, :, :1], spans[:, None, :, 1:]
    return (begin <= key) & (key < end)


def _all_heads(x: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """q, k and v [B, H, ...], what is added to the scores, and whether those are a causal square.

    Such a square needs no mask: torch's kernel has one of its own.
    """
    per_key_head = x.q.shape[2] // x.k.shape[2]
    q, k, v = (heads.transpose(1, 2) for heads in x[:3])
    if per_key_head > 1:
        k, v = (heads.repeat_interleave(per_key_head, dim=1) for heads in (k, v))
    if x.mask is None and x.bias is None and (not x.causal or q.shape[2] == k.shape[2]):
        return q, k, v, None, x.causal
    added = added_to_scores(x)
    if added is not None:
        added = added.expand(*q.shape[:3], k.shape[2])
    return q, k, v, added, False
