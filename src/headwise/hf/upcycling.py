"""Experts that start as slices of the MLP that they replace."""

from typing import Any

import torch
from torch import nn

from headwise.nn import MHMoE
from headwise.ops.activations import activate

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def start_as_slices(layer: MHMoE, mlp: Any) -> None:
    """Give expert e the e-th slice of the MLP's hidden units, with its output times E.

        mlp(x) = sum_e slice_e(x) = sum_e 1/E · (E · slice_e(x))

    The weights of all E experts are 1/E where the router is 0: it starts so if all are on. With
    fewer, the router stays as it was, so that tokens spread over the experts.

    **Source**: LLaMA-MoE, arXiv 2406.16554, section 3 (slices of neighbours, scaled outputs);
    sparse upcycling, arXiv 2212.05055.

    Raises:
        ValueError: If the MLP is of another layout, width or activation.
    """
    _check(layer, mlp)
    num_experts = layer.num_experts
    experts: Any = layer.experts
    router: Any = layer.router
    with torch.no_grad():
        gate, up = (p.weight.unflatten(0, (num_experts, -1)) for p in (mlp.gate_proj, mlp.up_proj))
        down = mlp.down_proj.weight.unflatten(1, (num_experts, -1)).movedim(1, 0)
        experts.up_proj.copy_(torch.cat([gate, up], dim=1))
        experts.down_proj.copy_(num_experts * down)
        if router.top_k == num_experts:
            router.weight.zero_()


def _check(layer: MHMoE, mlp: Any) -> None:
    kind = type(mlp).__name__
    projections = [getattr(mlp, name, None) for name in _PROJECTIONS]
    plain = all(isinstance(p, nn.Linear) and p.bias is None for p in projections)
    if not (plain and hasattr(mlp, "act_fn")):
        raise ValueError(
            f"experts_from is 'mlp', but {kind} is not made of {', '.join(_PROJECTIONS)} (without "
            "biases) and act_fn; it must be 'random'"
        )
    width, count = mlp.down_proj.in_features, layer.num_experts
    if count * layer.expert_dim != width:
        fitting = "num_experts must divide it" if width % count else f"expert_dim {width // count}"
        raise ValueError(
            f"expert_dim is {layer.expert_dim} with {count} experts; with experts_from 'mlp' all "
            f"together must have the hidden width of {kind}, {width}: {fitting}"
        )
    x = torch.linspace(-4, 4, 65)
    if not torch.allclose(mlp.act_fn(x), activate(x, layer.activation, len(x)), atol=1e-6):
        raise ValueError(
            f"activation is {layer.activation!r}; with experts_from 'mlp' it must be that of "
            f"{kind}, {mlp.act_fn}"
        )
