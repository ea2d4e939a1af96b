"""Plain attention with the log-sum-exp of the scores, by which results over more keys are merged.

`attend` takes some rows [b, h, n, C] to some keys [b, h, s, C], `attend_all` all heads of all
tokens, [B, T, H, C], times their gates. On CPUs torch's own flash kernels do the work (bfloat16
products, float32 sums); elsewhere matrix products and a softmax do.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from headwise.ops.dtypes import wide_dtype, widened
from headwise.ops.tensors import adjacent

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    blind: bool,
) -> tuple[Tensor, Tensor]:
    """Attention output and log-sum-exp [b, h, n]; 0 and -inf for a row that sees no key.

    Such rows exist only if `blind`. `added` [b, h, n, s] is added to the scores; `causal` lets row
    i see keys 0..i.
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


def added_to_scores(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Mask, bias and causality of q [B, T, H, C] and k [B, S, Hkv, C] as one tensor to add."""
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


def attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C] and the log-sum-exp of the scores [B, T, H], of heads that are off, too."""
    added, square = _added(q, k, causal, mask, bias)
    per_key_head = q.shape[2] // k.shape[2]
    out, lse = attend(
        q.transpose(1, 2),
        _per_query_head(k, per_key_head),
        _per_query_head(v, per_key_head),
        added=added,
        causal=square,
        scale=scale,
        blind=added is not None,
    )
    y = out.transpose(1, 2) * gate.to(q.dtype).unsqueeze(-1)
    return y, lse.transpose(1, 2).contiguous()


def attend_all_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate and bias (empty unless `needs_bias`)."""
    added, square = _added(q, k, causal, mask, bias)
    per_key_head = q.shape[2] // k.shape[2]
    dout, out, dgate = before_the_gates(dy, y, gate.to(wide_dtype(q)))
    part = attend_backward(
        dout.transpose(1, 2),
        q.transpose(1, 2),
        _per_query_head(k, per_key_head),
        _per_query_head(v, per_key_head),
        out.transpose(1, 2),
        lse.transpose(1, 2),
        added=added,
        causal=square,
        scale=scale,
        scores_gradient=needs_bias,
    )
    dq = part.q.transpose(1, 2).contiguous()
    dk, dv = (
        x.unflatten(1, (-1, per_key_head)).sum(2).transpose(1, 2).contiguous() for x in part[1:3]
    )
    dbias = q.new_empty(0)
    if needs_bias and bias is not None and part.scores is not None:
        dbias = part.scores.sum_to_size(bias.shape)
    return dq, dk, dv, dgate.to(gate.dtype), dbias


def before_the_gates(dy: Tensor, y: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What y = gate · out, [..., C], says of out [..., C] and of the gates [...].

        dout = gate · dy,   out = y / gate,   dgate = dy · out = dout · out / gate

    A gate of 0 gets no gradient and gives none. Gates are float32 or wider, and so is dgate.
    """
    gates = gates.unsqueeze(-1)
    safe = torch.where(gates == 0, 1, gates)
    dout, out = (dy * gates).to(dy.dtype), (y / safe).to(y.dtype)
    return dout, out, (dout * out).sum(-1, dtype=gates.dtype) / safe.squeeze(-1)


def _added(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, bool]:
    """What is added to the scores, and whether the kernel uses its own causal mask instead."""
    if mask is None and bias is None and (not causal or q.shape[1] == k.shape[1]):
        return None, causal
    added = added_to_scores(q, k, causal, mask, bias)
    if added is not None:
        added = added.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return added, False


def _per_query_head(x: Tensor, per_key_head: int) -> Tensor:
    """[B, S, Hkv, C] to [B, H, S, C]."""
    x = x.transpose(1, 2)
    return x.repeat_interleave(per_key_head, dim=1) if per_key_head > 1 else x
