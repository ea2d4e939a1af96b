"""Aggregated attention with loops: the specification, which all implementations must equal."""

import torch
from torch import Tensor

from headwise.ops.aggregated.operands import Operands


def aggregated_attention(x: Operands) -> Tensor:
    q, k, v, k_pool, v_pool, gate = x[:6]
    batch, tokens, heads, _ = q.shape
    rows = []
    for b in range(batch):
        for t in range(tokens):
            at, near = _neighbours(t, x.size, x.window)
            for h in range(heads):
                if gate[b, t, h] == 0:
                    rows.append(torch.zeros_like(q[b, t, h]))
                    continue
                local = k[b, near, h] @ q[b, t, h] + x.local_bias[h, at]
                pooled = k_pool[b, :, h] @ q[b, t, h] + x.pool_bias[h, t]
                weights = torch.cat([local, pooled]).softmax(-1)
                learned = x.unit_q[b, t, h] @ x.learned_tokens[h][:, at] + x.learned_bias[h, at]
                y = (weights[: len(at)] + learned) @ v[b, near, h]
                y = y + weights[len(at) :] @ v_pool[b, :, h]
                rows.append((gate[b, t, h] * y).to(q.dtype))
    return torch.stack(rows).reshape(q.shape)


def _neighbours(t: int, size: tuple[int, int], window: int) -> tuple[list[int], list[int]]:
    """The window positions of token t that are inside the image, and the tokens that are there."""
    (height, width), reach = size, window // 2
    at, near = [], []
    for i in range(window):
        for j in range(window):
            row, column = t // width + i - reach, t % width + j - reach
            if 0 <= row < height and 0 <= column < width:
                at.append(i * window + j)
                near.append(row * width + column)
    return at, near
