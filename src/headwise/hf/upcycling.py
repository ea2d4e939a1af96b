"""Experts that start as slices or groups of the MLP that they replace."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from headwise.hf.expert_configs import FittedExperts
from headwise.nn import FittedExpertRouter, MHMoE, MoE
from headwise.ops.activations import activate

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def start_from_mlp(layer: MoE, mlp: Any, number: int, fitted: FittedExperts | None) -> None:
    """Give the experts the hidden units of the MLP of the layer of that number.

    Raises:
        ValueError: If the MLP cannot be cut so, or the experts were fitted to another one.
    """
    check_is_cut(layer, mlp)
    if fitted is None:
        _start_as_slices(layer, mlp)
    else:
        _start_as_groups(layer, mlp, fitted.orders[number], fitted.routers[number])


def _start_as_slices(layer: MoE, mlp: Any) -> None:
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
        experts.gate_up_proj.copy_(heads**0.5 * torch.cat([gate, up], dim=1))
        experts.down_proj.copy_(slices * down)
        if isinstance(layer, MHMoE):
            for proj in filter(None, (layer.head_proj, layer.merge_proj)):
                nn.init.eye_(proj.weight)
        if router.top_k == slices == layer.num_experts:
            router.weight.zero_()


def _start_as_groups(layer: MoE, mlp: Any, order: Tensor, fitted: Mapping[str, Tensor]) -> None:
    """Units by their order: first those of the shared expert, then expert by expert.

        mlp(x) = shared(x) + sum_e group_e(x)

    The gains of the shared expert's groups become part of what it writes.
    """
    experts: Any = layer.experts
    router: Any = layer.router
    if fitted and fitted["weight"].shape != router.weight.shape:
        raise ValueError(
            f"mlp was fitted to another model: its routers have {list(fitted['weight'].shape)} "
            f"weights, and this model's {list(router.weight.shape)}"
        )
    gate, up, down = (
        projection.weight.detach().index_select(dim, order.to(projection.weight.device))
        for projection, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1))
    )
    num_shared = len(order) - layer.num_experts * layer.expert_dim
    gain = fitted.get("gain", torch.ones(len(order) // layer.expert_dim))
    of_shared, of_experts = gain.split([num_shared // layer.expert_dim, layer.num_experts])
    with torch.no_grad():
        if layer.shared_expert is not None:
            written = down[:, :num_shared] * of_shared.repeat_interleave(layer.expert_dim).to(down)
            shared: Any = layer.shared_expert
            shared.gate_up_proj.copy_(torch.cat([gate[:num_shared], up[:num_shared]]))
            shared.down_proj.copy_(written)
        read = [w[num_shared:].unflatten(0, (layer.num_experts, -1)) for w in (gate, up)]
        experts.gate_up_proj.copy_(torch.cat(read, dim=1))
        experts.down_proj.copy_(
            rearrange(down[:, num_shared:], "d (e f) -> e d f", f=layer.expert_dim)
        )
    if fitted:
        router.load_state_dict({**fitted, "gain": of_experts})


def check_is_cut(layer: MoE, mlp: Any) -> None:
    """Raises ValueError unless the experts together are the MLP: as wide, and of its kind."""
    kind = type(mlp).__name__
    projections = [getattr(mlp, name, None) for name in _PROJECTIONS]
    plain = all(isinstance(p, nn.Linear) and p.bias is None for p in projections)
    if not (plain and hasattr(mlp, "act_fn")):
        raise ValueError(
            f"experts_from is 'mlp', but {kind} is not made of {', '.join(_PROJECTIONS)} (without "
            "biases) and act_fn; it must be 'random'"
        )
    width, slices = mlp.down_proj.in_features, layer.num_experts // layer.num_heads
    if isinstance(layer.router, FittedExpertRouter):
        shared = 0 if layer.shared_expert is None else layer.shared_expert.down_proj.shape[-1]
        if slices * layer.expert_dim + shared != width:
            raise ValueError(
                f"shared_expert_dim {shared} and {slices} experts of {layer.expert_dim} are "
                f"{slices * layer.expert_dim + shared} units; with router 'fitted' they must be "
                f"the hidden width of {kind}, {width}"
            )
    elif slices * layer.expert_dim != width:
        unit = "num_experts" if layer.num_heads == 1 else "num_experts / num_heads"
        fitting = f"{unit} must divide it" if width % slices else f"expert_dim {width // slices}"
        raise ValueError(
            f"expert_dim is {layer.expert_dim} with {slices} slices; with experts_from 'mlp' all "
            f"together must have the hidden width of {kind}, {width}: {fitting}"
        )
    x = torch.linspace(-4, 4, 65)
    activation = layer.experts.activation
    if not torch.allclose(mlp.act_fn(x), activate(x, activation, len(x)), atol=1e-6):
        raise ValueError(
            f"activation is {activation!r}; with experts_from 'mlp' it must be that of "
            f"{kind}, {mlp.act_fn}"
        )
