"""Parameters of a model, and those of them that a token uses."""

from torch import nn

from headwise.nn import MoE
from headwise.nn.bitlinear import PackedExperts, PackedLinear


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Total and active parameters: of the experts, a token uses top_k for each sub-token.

    Parameters that several modules share count once. Heads that are off stay active here: a token
    does not use their output, but their keys and values are computed for it. A packed ternary
    weight counts as a parameter, its scale does not.
    """
    total = _weights(model)
    idle = 0
    for module in model.modules():
        if isinstance(module, MoE):
            used = min(module.num_experts, module.num_heads * module.router.top_k)
            experts = _weights(module.experts)
            idle += experts * (module.num_experts - used) // module.num_experts
    return total, total - idle


def _weights(module: nn.Module) -> int:
    packed = [m for m in module.modules() if isinstance(m, PackedExperts | PackedLinear)]
    return sum(p.numel() for p in module.parameters()) + sum(m.num_weights for m in packed)
