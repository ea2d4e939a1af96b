"""The mixture with a loop over tokens and choices: the specification of every implementation."""

import torch
from torch import Tensor

from headwise.ops.activations import Activation, activate
from headwise.ops.experts.choices import known_choices


def expert_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    num_experts = len(up)
    indices = known_choices(indices, num_experts).view(indices.shape)
    rows = []
    for token, token_weights, experts in zip(x, weights, indices, strict=True):
        y = torch.zeros_like(token)
        for weight, e in zip(token_weights, experts.tolist(), strict=True):
            if e < num_experts:
                hidden = activate(up[e] @ token, activation, down.shape[2])
                y = y + (weight * (down[e] @ hidden)).to(x.dtype)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)
