"""All heads by torch's own attention, then the gate: correct everywhere, skips nothing."""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.ops.plain_attention import Operands, lower_triangle


def head_attention(x: Operands, dropout: float = 0.0) -> Tensor:
    q, k, v, gate, causal, mask, bias, scale = x
    queries, keys = q.shape[1], k.shape[1]
    # One query sees every key; torch's own causal flag is right for square scores only.
    plain = mask is None and bias is None and queries == keys
    needs_causal_mask = causal and queries > 1 and not plain
    if needs_causal_mask:
        lower = lower_triangle(q, k)
        mask = lower if mask is None else mask & lower
    heads = scaled_dot_product_attention(
        rearrange(q, "b t h c -> b h t c"),
        rearrange(k, "b s h c -> b h s c"),
        rearrange(v, "b s h c -> b h s c"),
        attn_mask=_additive(mask, bias, q.dtype),
        dropout_p=dropout,
        is_causal=causal and queries > 1 and not needs_causal_mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    gated = rearrange(heads, "b h t c -> b t h c") * gate.to(q.dtype).unsqueeze(-1)
    return torch.where((gate != 0).unsqueeze(-1), gated, 0)


def _additive(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return mask
    bias = bias.to(dtype)
    return bias if mask is None else torch.where(mask, bias, float("-inf"))
