"""All heads in plain PyTorch, then the gate: correct everywhere, skips nothing.

The window is w² shifted views of one padded map, taken one after the other: unfolding keys and
values would hold w² copies of each, and nothing larger than they are is kept here.
"""

import torch
from einops import rearrange
from torch import Tensor

from headwise.ops.aggregated.window import inside, shifted


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    gate: Tensor,
    *,
    size: tuple[int, int],
    window: int,
    local_bias: Tensor,
    pool_bias: Tensor,
    unit_q: Tensor,
    learned_tokens: Tensor,
    learned_bias: Tensor,
) -> Tensor:
    local_bias, pool_bias, learned_tokens, learned_bias = (
        x.to(q.dtype) for x in (local_bias, pool_bias, learned_tokens, learned_bias)
    )
    q_map, q_heads = q.unflatten(1, size), rearrange(q, "b t h c -> b h t c")
    local = torch.stack([(q_map * key).sum(-1) for key in shifted(k, size, window)], dim=-1)
    local = rearrange(local, "b y x h w -> b h (y x) w") + local_bias[:, None]
    local = local.masked_fill(~inside(size, window, q.device), float("-inf"))
    pooled = q_heads @ rearrange(k_pool, "b p h c -> b h c p") + pool_bias
    weights = torch.cat([local, pooled], dim=-1).softmax(-1)
    learned = rearrange(unit_q, "b t h c -> b h t c") @ learned_tokens + learned_bias[:, None]
    near = rearrange(weights[..., : window**2] + learned, "b h (y x) w -> w b y x h 1", y=size[0])
    far = weights[..., window**2 :] @ rearrange(v_pool, "b p h c -> b h p c")
    y = rearrange(far, "b h (y x) c -> b y x h c", y=size[0])
    for weight, value in zip(near, shifted(v, size, window), strict=True):
        y = y + weight * value
    gated = y.flatten(1, 2) * gate.to(q.dtype).unsqueeze(-1)
    return torch.where((gate != 0).unsqueeze(-1), gated, 0)
