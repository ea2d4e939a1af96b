"""The mixture with a loop over tokens and choices: the specification of every implementation."""

import torch
from torch import Tensor

from headwise.ops.activations import Activation, activate


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: Activation,
) -> Tensor:
    rows = []
    for token, token_weights, experts in zip(x, weights, indices, strict=True):
        y = torch.zeros_like(token)
        for weight, e in zip(token_weights, experts.tolist(), strict=True):
            if e >= 0:
                hidden = activate(up_proj[e] @ token, activation, down_proj.shape[2])
                y = y + (weight * (down_proj[e] @ hidden)).to(x.dtype)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)
