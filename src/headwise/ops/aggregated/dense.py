"""All heads in plain PyTorch, then the gate: correct everywhere, skips nothing.

The window is w² shifted views of one padded map, taken one after the other: unfolding keys and
values would hold w² copies of each, and nothing larger than they are is kept here.
"""

import torch
from einops import rearrange
from torch import Tensor

from headwise.ops.aggregated.operands import Operands
from headwise.ops.window import inside, shifted


def aggregated_attention(x: Operands) -> Tensor:
    q, gate, size, window = x.q, x.gate, x.size, x.window
    local_bias, pool_bias, learned_tokens, learned_bias = (
        parameter.to(q.dtype)
        for parameter in (x.local_bias, x.pool_bias, x.learned_tokens, x.learned_bias)
    )
    q_map, q_heads = q.unflatten(1, size), rearrange(q, "b t h c -> b h t c")
    local = torch.stack([(q_map * key).sum(-1) for key in shifted(x.k, size, window)], dim=-1)
    local = rearrange(local, "b y x h w -> b h (y x) w") + local_bias[:, None]
    local = local.masked_fill(~inside(size, window, q.device), float("-inf"))
    pooled = q_heads @ rearrange(x.k_pool, "b p h c -> b h c p") + pool_bias
    weights = torch.cat([local, pooled], dim=-1).softmax(-1)
    learned = rearrange(x.unit_q, "b t h c -> b h t c") @ learned_tokens + learned_bias[:, None]
    near = rearrange(weights[..., : window**2] + learned, "b h (y x) w -> w b y x h 1", y=size[0])
    far = weights[..., window**2 :] @ rearrange(x.v_pool, "b p h c -> b h p c")
    y = rearrange(far, "b h (y x) c -> b y x h c", y=size[0])
    for weight, value in zip(near, shifted(x.v, size, window), strict=True):
        y = y + weight * value
    gated = y.flatten(1, 2) * gate.to(q.dtype).unsqueeze(-1)
    return torch.where((gate != 0).unsqueeze(-1), gated, 0)
