"""Every expert on every token in torch's own operators: no shape depends on a choice."""

import torch
from torch import Tensor

from headwise.ops.activations import Activation, activate
from headwise.ops.experts.choices import known_choices


def expert_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    num_experts = up.shape[0]
    choices = known_choices(indices, num_experts).view(indices.shape)
    # [E, N, K]
    chosen = choices == torch.arange(num_experts, device=x.device).view(-1, 1, 1)
    on = chosen.any(-1, keepdim=True)
    # Only after this is a row of inf or NaN harmless to the experts that it did not choose.
    rows = torch.where(on, x, 0)
    out = activate(rows @ up.mT, activation, down.shape[2]) @ down.mT
    gate = torch.where(chosen, weights.to(out.dtype), 0).sum(-1, keepdim=True)
    return torch.where(on, out * gate, 0).sum(0)
