"""Experts that start as slices of the MLP that they replace."""

from typing import Any

import torch
from einops import rearrange
from torch import nn

from headwise.nn import MHMoE, MoE
from headwise.ops.activations import activate

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def start_as_slices(layer: MoE, mlp: Any) -> None:
    """Cut the MLP's hidden units into S slices, one an expert, each with its output times S.

        mlp(x) = sum_e slice_e(x) = sum_e 1/S · (S · slice_e(x))

    The weights of all S experts are 1/S where the router is 0: it starts so if all are on. With
    fewer, the router stays as it was, so that tokens spread over the experts.

    With h heads there are h experts a slice: expert i·h + j reads part j of the token and writes
    part j. Head and merge layers start as identities, the matrices that read times √h, because a
    sum over one part of h has 1/h of the variance.

    **Source**: LLaMA-MoE, arXiv 2406.16554, section 3 (slices of neighbours, scaled outputs);
    sparse upcycling, arXiv 2212.05055. The parts are ours.
    """
    _check(layer, mlp)
    heads = layer.num_heads
    slices = layer.num_experts // heads
    experts: Any = layer.experts
    router: Any = layer.router
    gate, up = (
        rearrange(p.weight, "(i f) (j s) -> (i j) f s", i=slices, j=heads)
        for p in (mlp.gate_proj, mlp.up_proj)
    )
    down = rearrange(mlp.down_proj.weight, "(j s) (i f) -> (i j) s f", i=slices, j=heads)
    with torch.no_grad():
        experts.up_proj.copy_(heads**0.5 * torch.cat([gate, up], dim=1))
        experts.down_proj.copy_(slices * down)
        if isinstance(layer, MHMoE):
            for proj in filter(None, (layer.head_proj, layer.merge_proj)):
                nn.init.eye_(proj.weight)
        if router.top_k == slices == layer.num_experts:
            router.weight.zero_()


def _check(layer: MoE, mlp: Any) -> None:
    kind = type(mlp).__name__
    projections = [getattr(mlp, name, None) for name in _PROJECTIONS]
    plain = all(isinstance(p, nn.Linear) and p.bias is None for p in projections)
    if not (plain and hasattr(mlp, "act_fn")):
        raise ValueError(
            f"experts_from is 'mlp', but {kind} is not made of {', '.join(_PROJECTIONS)} (without "
            "biases) and act_fn; it must be 'random'"
        )
    width, slices = mlp.down_proj.in_features, layer.num_experts // layer.num_heads
    if slices * layer.expert_dim != width:
        unit = "num_experts" if layer.num_heads == 1 else "num_experts / num_heads"
        fitting = f"{unit} must divide it" if width % slices else f"expert_dim {width // slices}"
        raise ValueError(
            f"expert_dim is {layer.expert_dim} with {slices} slices; with experts_from 'mlp' all "
            f"together must have the hidden width of {kind}, {width}: {fitting}"
        )
    x = torch.linspace(-4, 4, 65)
    if not torch.allclose(mlp.act_fn(x), activate(x, layer.activation, len(x)), atol=1e-6):
        raise ValueError(
            f"activation is {layer.activation!r}; with experts_from 'mlp' it must be that of "
            f"{kind}, {mlp.act_fn}"
        )
