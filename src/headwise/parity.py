"""What a layer costs: FLOPs and parameters by formula, and mixtures of equal cost.

A multiply-add is 2 FLOPs. Like torch's counter, the formulas count matrix products and attention,
not norms, softmax or activations; causal attention is counted as the pairs that are seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from headwise.nn import HeadBudget, LinearRouter, MHMoE
from headwise.nn.bitlinear import PackedLinear, PackedMatrices
from headwise.nn.mh_moe import ExpertMatrices
from headwise.nn.routers import CosineRouter, ScoreMap


class SparseMoEMatch(NamedTuple):
    """An MH-MoE that costs what a sparse MoE does.

    Attributes:
        expert_dim: Hidden width of an expert, after rounding.
        num_experts: Experts, after rounding.
        flops_ratio: FLOPs per token over those of the sparse MoE, routers left out.
        parameter_ratio: Parameters over those of the sparse MoE, routers left out.
    """

    expert_dim: int
    num_experts: int
    flops_ratio: float
    parameter_ratio: float


def match_sparse_moe(
    dim: int,
    num_experts: int,
    top_k: int,
    expert_dim: int,
    *,
    heads: int,
    top_k_mh: int | None = None,
    glu: bool = True,
    multiple_of: int = 8,
) -> SparseMoEMatch:
    """Width and number of MH-MoE's experts for the FLOPs and parameters of a sparse MoE.

    With m = 3 matrices an expert (glu) or 2, d = dim, f0, E0, k0 the sparse MoE's, k = top_k_mh:

        FLOPs:       2·m·d·f0·k0 = 4·d² + 2·m·d·f·k      =>  f = (k0·f0 - 2·d/m) / k
        parameters:  m·d·f0·E0 = 2·d² + m·(d/heads)·f·E  =>  E = (f0·E0 - 2·d/m)·heads / f

    **Source**: MH-MoE, arXiv 2411.16205, Eq. 8 and 9 (m = 2, k = k0), and its tables (m = 3).

    Args:
        dim: Width of the tokens.
        num_experts: E0, experts of the sparse MoE.
        top_k: k0, experts that its tokens go to.
        expert_dim: f0, hidden width of its experts.
        heads: Sub-tokens of a token; divides dim.
        top_k_mh: k, experts that a sub-token goes to. Default: heads · top_k, as in the paper.
        glu: Gated experts on both sides.
        multiple_of: f is rounded to the nearest multiple of this.

    Raises:
        ValueError: If heads does not divide dim, or no positive f exists.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"heads is {heads}; it must divide dim = {dim}")
    k = heads * top_k if top_k_mh is None else top_k_mh
    matrices = 3 if glu else 2
    width = (top_k * expert_dim - 2 * dim / matrices) / k
    if width <= 0:
        raise ValueError(
            f"expert_dim is {expert_dim}; head and merge layer alone cost as much as {top_k} such "
            f"experts, so it must exceed {2 * dim / matrices / top_k:g}"
        )
    f = max(multiple_of, round(width / multiple_of) * multiple_of)
    sparse_parameters = matrices * dim * expert_dim * num_experts
    per_expert = matrices * (dim // heads) * f
    e = max(k, round((sparse_parameters - 2 * dim**2) / per_expert))
    flops = 4 * dim**2 + 2 * matrices * dim * f * k
    return SparseMoEMatch(
        expert_dim=f,
        num_experts=e,
        flops_ratio=flops / (2 * matrices * dim * expert_dim * top_k),
        parameter_ratio=(2 * dim**2 + per_expert * e) / sparse_parameters,
    )


def count_flops(model: nn.Module, *, sequence_length: int, causal: bool = True) -> dict[str, float]:
    """FLOPs of a forward per token, by module, by formula; their sum is the model's.

    Heads that are off are not counted: the figure is what skipping can reach, not what an
    implementation that masks them spends. `measure_flops` counts what really runs.

    Args:
        model: A layer of ours, or a transformers model of the Llama layout, converted or not.
        sequence_length: Tokens that attend to each other.
        causal: Whether a token sees only those before it: (sequence_length + 1) / 2 on average.

    Returns:
        FLOPs per token of each module that costs any.
    """
    keys = (sequence_length + 1) / 2 if causal else sequence_length
    flops: dict[str, float] = {}
    rows = {}  # sub-tokens of a token, for what lives inside an MHMoE
    for name, module in model.named_modules():
        if isinstance(module, MHMoE):
            rows[_child(name, "router")] = module.num_heads
            rows[_child(name, "experts")] = module.num_heads * module.router.top_k
        cost = _module_flops(module, keys) * rows.get(name, 1)
        if cost:
            flops[name] = cost
    return flops


def measure_flops(run: Callable[[], Any]) -> int:
    """FLOPs that torch's counter sees while `run()` runs, with causal attention counted exactly."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={flash: _attention_flops}) as counter:
        run()
    return counter.get_total_flops()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Total and active parameters: of the experts, a token uses top_k for each sub-token.

    A packed ternary weight counts as a parameter, its scale does not.
    """
    total = _weights(model)
    idle = 0
    for module in model.modules():
        if isinstance(module, MHMoE):
            used = min(module.num_experts, module.num_heads * module.router.top_k)
            experts = _weights(module.experts)
            idle += experts * (module.num_experts - used) // module.num_experts
    return total, total - idle


def _weights(module: nn.Module) -> int:
    packed = [m for m in module.modules() if isinstance(m, PackedLinear | PackedMatrices)]
    return sum(p.numel() for p in module.parameters()) + sum(m.num_weights for m in packed)


def _module_flops(module: nn.Module, keys: float) -> float:
    if isinstance(module, nn.Linear | LinearRouter | ScoreMap):
        return 2 * module.weight.numel()
    if isinstance(module, CosineRouter):
        return 2 * (module.projection.numel() + module.embedding.numel())
    if isinstance(module, ExpertMatrices):
        return 2 * (module.up_proj[0].numel() + module.down_proj[0].numel())
    if isinstance(module, PackedLinear):
        return 2 * module.num_weights
    if isinstance(module, PackedMatrices):
        return 2 * module.num_weights // module.num_experts
    q_proj = getattr(module, "q_proj", None)
    if isinstance(q_proj, nn.Linear | PackedLinear):
        budget: HeadBudget | None = getattr(getattr(module, "router", None), "budget", None)
        share = 1.0 if budget is None else budget.active_share
        return 4 * q_proj.out_features * keys * share
    return 0


def _child(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _attention_flops(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> int:
    batch, heads, queries, channels = q
    keys = k[2]
    pairs = queries * (2 * keys - queries + 1) // 2 if is_causal else queries * keys
    return 4 * batch * heads * pairs * channels
