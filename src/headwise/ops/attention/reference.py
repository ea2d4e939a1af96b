"""MoH's Eq. 4 with loops: the specification that every implementation is tested against."""

import torch
from torch import Tensor

from headwise.ops.plain_attention import Operands


def head_attention(x: Operands) -> Tensor:
    q, k, v, gate, causal, mask, bias, scale = x
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    visible = _visible(q, k, causal, mask)
    if bias is not None:
        bias = bias.expand(batch, heads, queries, keys)
        visible = visible & (bias != -torch.inf)
    rows = []
    for b in range(batch):
        for t in range(queries):
            for h in range(heads):
                seen = visible[b, h, t]
                if gate[b, t, h] == 0 or not seen.any():
                    rows.append(torch.zeros_like(q[b, t, h]))
                    continue
                g = h * kv_heads // heads
                scores = scale * k[b, seen, g] @ q[b, t, h]
                if bias is not None:
                    scores = scores + bias[b, h, t, seen]
                y = scores.softmax(-1) @ v[b, seen, g]
                rows.append((gate[b, t, h] * y).to(q.dtype))
    return torch.stack(rows).reshape(q.shape) if rows else torch.zeros_like(q)


def _visible(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(keys - queries)
    return visible if mask is None else visible & mask
