"""All heads of every token in one go, then the gate: what gathering falls back to by its rule."""

import torch
from torch import Tensor

from headwise.ops.attention.rectangle import added_to_scores, attend, attend_backward


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C] and the log-sum-exp of the scores [B, T, H]."""
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


def backward(
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
    gates = gate.to(torch.promote_types(q.dtype, torch.float32)).unsqueeze(-1)
    safe = torch.where(gates == 0, 1, gates)
    dout, out = (dy * gates).to(q.dtype), (y / safe).to(q.dtype)
    dgate = (dout * out).sum(-1, dtype=gates.dtype) / safe.squeeze(-1)
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


def _added(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, bool]:
    """What is added to the scores, and whether the kernel's own causal mask does instead."""
    if mask is None and bias is None and (not causal or q.shape[1] == k.shape[1]):
        return None, causal
    added = added_to_scores(q, k, causal, mask, bias)
    if added is not None:
        added = added.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return added, False


def _per_query_head(x: Tensor, per_key_head: int) -> Tensor:
    """[B, S, Hkv, C] to [B, H, S, C]."""
    return (
        x.transpose(1, 2).repeat_interleave(per_key_head, dim=1)
        if per_key_head > 1
        else x.transpose(1, 2)
    )
