"""Models of equal layers: their sizes, mixtures of equal cost, and whole models of equal cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from headwise.hf import MHMoEConfig, MoEConfig, convert
from headwise.memory import check_memory
from headwise.nn import MHMoE
from headwise.parity import match_sparse_moe
from headwise.training.comparison import ComparisonRun, Variant
from headwise.training.fields import check_at_least

# Costs that differ by less are equal.
_AS_GOOD_AS_EQUAL = 0.005


@dataclass(frozen=True, kw_only=True)
class LayeredRun(ComparisonRun):
    """Models of equal layers, converted and given the dense one's cost.

    Attributes:
        dim: Width of the models.
        num_layers: Layers.
        num_heads: Attention heads of a layer.
        mlp_dim: Hidden width of the dense model's MLPs, and of a sparse MoE's experts.
        initializer_range: Deviation with which weights start; None is sqrt(2 / (5 · dim))
            (arXiv 1910.05895), 0.02 at the width of 1000.
        residual_scale: Factor on the starting weights of what is added to the residual stream:
            attention's o_proj, the last matrix of MLPs and experts, MH-MoE's merge layer; None is
            1/√(2 · num_layers), as in GPT-2.
        num_experts: Experts of the sparse MoE; MH-MoE's number follows from equal parameters.
        top_k: Experts that a token of the sparse MoE goes to.
        every: Experts replace the MLP of each n-th layer.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 8
    mlp_dim: int = 344
    initializer_range: float | None = None
    residual_scale: float | None = None
    num_experts: int = 8
    top_k: int = 1
    every: int = 2

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "mlp_dim", "every"):
            check_at_least(1, name, getattr(self, name))
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide dim = {self.dim}")
        for name in ("initializer_range", "residual_scale"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value}; it must lie in 0..1, above 0")
        self._check_weights()
        super().__post_init__()
        self._check_experts()

    def _check_weights(self) -> None:
        """In float32; of an MLP two matrices, for not all are gated."""
        sizes = {"dim": self.dim, "num_layers": self.num_layers, "mlp_dim": self.mlp_dim}
        layers = 4 * self.num_layers * (4 * self.dim**2 + 2 * self.dim * self.mlp_dim)
        check_memory(layers, "the weights of the layers", **sizes)

    def _check_experts(self) -> None:
        """The same, where a model has experts."""
        names = ("num_experts", "dim", "mlp_dim", "num_layers")
        weights = 4 * math.prod(getattr(self, name) for name in names) // self.every
        if any(variant.mlp for variant in self.selected()):
            sizes = {name: getattr(self, name) for name in names}
            check_memory(weights, "the weights of the experts", **sizes)

    def least_numbers(self) -> tuple[int, dict[str, object]]:
        return self.dim * self.num_layers, {"dim": self.dim, "num_layers": self.num_layers}

    @property
    def initial_deviation(self) -> float:
        """Of the weights of dense layers."""
        return self.initializer_range or (2 / (5 * self.dim)) ** 0.5

    def cost_of(self) -> Variant | None:
        """The first, dense one."""
        return self.variants()[0]


def sparse_moe(run: LayeredRun, **changes: Any) -> MoEConfig:
    """The run's sparse mixture: experts as wide as the dense model's MLP."""
    fields: dict[str, Any] = {
        "num_experts": run.num_experts,
        "top_k": run.top_k,
        "expert_dim": run.mlp_dim,
        "normalize_top_k": run.top_k > 1,  # of a single choice the weight would always be 1
        "balance_coefficient": run.balance_coefficient,
    }
    return MoEConfig(**fields | changes)


def fine_grained_moe(run: LayeredRun, **changes: Any) -> MoEConfig:
    """The sparse mixture with twice as many experts of half the width, twice as many of them on."""
    return replace(sparse_moe(run, **changes).fine_grained(2), normalize_top_k=True)


def mh_moe(run: LayeredRun, *, heads: int, top_k: int, **changes: Any) -> MHMoEConfig:
    """MH-MoE at the FLOPs and parameters of the run's sparse mixture."""
    match = match_sparse_moe(
        run.dim,
        run.num_experts,
        run.top_k,
        run.mlp_dim,
        heads=heads,
        top_k_mh=top_k,
        glu=changes.get("glu", True),
    )
    fields: dict[str, Any] = {
        "num_heads": heads,
        "num_experts": match.num_experts,
        "top_k": top_k,
        "expert_dim": match.expert_dim,
        "normalize_top_k": top_k > 1,
        "balance_coefficient": run.balance_coefficient,
    }
    return MHMoEConfig(**fields | changes)


def first_paper_models(run: LayeredRun, *, heads: int, top_k: int, **shape: Any) -> list[Variant]:
    """What MH-MoE's first paper compares, arXiv 2404.15045: dense, a sparse MoE, X-MoE and MH-MoE.

    **Deviates**: the paper's MH-MoE costs about four times X-MoE's FLOPs; here all cost the same,
    and MH-MoE is that of the second paper, with a linear router.

    Args:
        run: The comparison.
        heads: Sub-tokens of a token of MH-MoE.
        top_k: Experts that a sub-token goes to.
        shape: Of all experts: glu, activation.
    """
    return [
        Variant(name="dense", label="dense"),
        Variant(name="moe", label="sparse MoE", mlp=sparse_moe(run, **shape)),
        Variant(name="x_moe", label="X-MoE", mlp=sparse_moe(run, router="cosine", **shape)),
        Variant(name="mh_moe", label="MH-MoE", mlp=mh_moe(run, heads=heads, top_k=top_k, **shape)),
    ]


def equal_width(run: LayeredRun, variant: Variant, flops: Callable[[Variant, int], float]) -> int:
    """The width of the dense MLPs with which a variant costs what the run's `cost_of` does.

    Routers cost a little, heads that are off save a little: the dense MLPs that are left take up
    the difference, to the next multiple of 8 of their width.

    Args:
        run: The comparison.
        variant: One of its models.
        flops: Of a model, by variant and width of its dense MLPs.

    Raises:
        ValueError: If there is no such width.
    """
    width, reference = run.mlp_dim, run.cost_of()
    if reference is None:
        return width
    target = flops(reference, width)
    now, wider = flops(variant, width), flops(variant, width + 8)
    if wider == now and abs(now / target - 1) > _AS_GOOD_AS_EQUAL:
        raise ValueError(
            f"every is {run.every}, which leaves no dense MLP in {variant.name} to make up for "
            f"what its routers cost and its heads save; it must be at least 2"
        )
    width += 8 * round((target - now) / (wider - now)) if wider > now else 0
    if width < 8:
        raise ValueError(
            f"mlp_dim is {run.mlp_dim}, too small for {variant.name} to cost what "
            f"{reference.name} does"
        )
    return width


def convert_variant(run: LayeredRun, variant: Variant, model: Any) -> Any:
    """The dense model, made what the variant says; what its branches add starts scaled by depth."""
    changes: dict[str, Any] = {
        "attention": variant.attention,
        "mlp": variant.mlp,
        "ternary": variant.ternary,
    }
    model = convert(model, every=run.every, **changes) if any(changes.values()) else model
    scale = (2 * run.num_layers) ** -0.5 if run.residual_scale is None else run.residual_scale
    _scale_last_maps(model, scale)
    return model


# Of attention, of Llama's MLPs and of experts, of MH-MoE, of ViT's MLPs.
_LAST_MAPS = ("o_proj.weight", "down_proj.weight", "down_proj", "merge_proj.weight", "fc2.weight")


@torch.no_grad()
def _scale_last_maps(model: nn.Module, scale: float) -> None:
    """Scale what the branches of a model add to its residual stream."""
    before_merge = {
        f"{name}.experts.down_proj"
        for name, module in model.named_modules()
        if isinstance(module, MHMoE) and module.merge_proj is not None
    }
    for name, weight in model.named_parameters():
        if name.endswith(_LAST_MAPS) and name not in before_merge:
            weight.mul_(scale)
