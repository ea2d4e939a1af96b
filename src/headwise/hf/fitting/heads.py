"""Fit routers of heads to a little text, in closed form."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.hf.calibration import Batches
from headwise.hf.conversion import Conversion, is_of_diffusers
from headwise.hf.fitting.layer import Layer
from headwise.hf.fitting.passes import (
    OF_FEW_NUMBERS,
    check_can_be_fitted,
    check_can_be_fitted_to,
    evaluating,
    fit_scores,
    measure_gains,
    measure_metrics,
    run,
)
from headwise.hf.fitting.sites import sites_of, sites_of_diffusers
from headwise.hf.fitting.solving import spend
from headwise.hf.head_configs import FittedHeads, MoHConfig
from headwise.hf.surgery import attention_modules, build_routers
from headwise.ops.choice import check_choice
from headwise.ops.fields import check

Allocation = Literal["loss", "alike"]


def fit(
    model: Any,
    batches: Batches,
    config: MoHConfig,
    *,
    allocate: Allocation = "loss",
    layers: Sequence[int] | None = None,
) -> FittedHeads:
    """Fit a router to each attention, so that converting loses little before any tuning.

    For layer l and token t, with z_h [C] the output of head h and M = E[u uᵀ] the mean over tokens
    of the outer product of u = ∂L/∂z [H·C], head h contributes

        c_th = sqrt(z_thᵀ M_hh z_th)

    to the loss L. Ridge regression fits log c_th ≈ W_h x_t + b_h to what the attention reads, x_t.
    The variance of what is left is added to b_h, because a normal log c of mean m and variance v
    has log E[c²] = 2 (m + v). A token switches on the heads of largest score. Each has a gain, by
    which what is on comes nearest to what all would give, in the norm of M.

    With `allocate="loss"`, `active` is the mean over the layers: what goes first, over all of them,
    is the head of last rank in its layer that contributes least (mean of c² over the tokens).

    Without `labels` in the batches there is no L, and M = W_O W_Oᵀ: the length of z_h W_O^h counts.

    **Source**: ours. Nearest: contextual sparsity (Deja Vu, arXiv 2310.17157) and Polar Sparsity
    (arXiv 2505.14884), which train such routers by gradient descent on norms of head outputs.

    Args:
        model: A model that is not converted yet; it stays as it was.
        batches: Arguments of its forward; what padding has, attention_mask 0, is not fitted to.
            An eighth is held out to choose the penalty of the regression, so there must be at
            least two. No more than a batch is in memory at a time.
        config: With router "fitted". It may share heads; none usually is best.
        allocate: "loss" spends the budget where the loss needs it; "alike" gives each layer what
            `active` says. "loss" needs `labels`.
        layers: Numbers of the layers to convert, counted from 0; all of them by default.

    Returns:
        What `convert(attention=)` takes.

    Raises:
        ValueError: If the model is converted already, cannot be, or its heads cannot be seen; if
            there are too few tokens (the message says how many are needed) or no labels; or if the
            budget does not fit.
    """
    check_choice("allocate", allocate, Allocation)
    check("config", config, MoHConfig)
    check_can_be_fitted(model, config.router)
    if allocate == "loss" and not isinstance(config.active, int | float):
        raise ValueError(
            "active has a budget for each layer, which allocate 'alike' takes; with 'loss' it must "
            "be one number, the mean over the layers"
        )
    check_can_be_fitted_to(batches)
    if allocate == "loss" and "labels" not in batches[0]:
        raise ValueError(
            "allocate is 'loss', and batches have no labels to take a loss of; without labels it "
            "must be 'alike'"
        )
    with evaluating(model):
        found, config, num_layers = _layers(model, batches[0], config, layers)
        measure_metrics(model, batches, found)
        fit_scores(model, batches, found)
        if allocate == "loss":
            _spend(config, found, _costs(model, batches, found))
        measure_gains(model, batches, found)
    if allocate == "loss":
        # The other layers are not converted.
        active: list[Any] = [1.0] * num_layers
        for layer in found:
            active[layer.number] = layer.budget.active_heads
        config = dataclasses.replace(config, active=tuple(active))
    return FittedHeads(
        config=config,
        routers={layer.number: layer.parameters() for layer in found},
        layers=None if layers is None else tuple(layer.number for layer in found),
    )


def _layers(
    model: Any, batch: Any, config: MoHConfig, layers: Sequence[int] | None
) -> tuple[list[Layer], MoHConfig, int]:
    """The layers to fit to, the configuration as it is for so many, and how many the model has."""
    if isinstance(model, PreTrainedModel):
        attentions: Sequence[Any] = list(attention_modules(model).values())
    elif is_of_diffusers(model):
        # Imported here because diffusers needs seconds for it, and is an extra.
        from headwise.hf import of_diffusers

        attentions = of_diffusers.self_attentions(model)
    else:
        raise ValueError(
            f"model is a {type(model).__name__}; it must be a model of transformers or diffusers"
        )
    num_layers = len(attentions)
    config = config.resolve(num_layers)
    chosen, _ = Conversion(attention=config, layers=layers).layers_of(num_layers)
    if isinstance(model, PreTrainedModel):
        by_name = build_routers(model, config, chosen)
        num_heads = {name: router.budget.num_heads for name, router in by_name.items()}
        sites = sites_of(model, num_heads, batch)
        routers: Sequence[Any] = list(by_name.values())
    else:
        sites = sites_of_diffusers([attentions[layer] for layer in chosen])
        routers = list(of_diffusers.build_routers(attentions, config, chosen).values())
    found = [
        Layer(number, site, router.dim, router.budget)
        for number, site, router in zip(chosen, sites, routers, strict=True)
    ]
    return found, config, num_layers


def _costs(model: Any, batches: Batches, layers: Sequence[Layer]) -> list[list[float]]:
    """By layer, the sum of c² over the tokens for the routed group of each rank, best first."""
    sums = [torch.zeros(layer.budget.routed_groups, dtype=torch.float64) for layer in layers]

    def see(_: int, i: int, x: Tensor, z: Tensor) -> None:
        ranked = layers[i].scores(x).argsort(dim=-1, descending=True)
        sums[i] += layers[i].contributions(z).gather(-1, ranked).double().sum(0).cpu()

    run(model, batches, layers, see, "costs of ranks", share=OF_FEW_NUMBERS)
    return [of_layer.tolist() for of_layer in sums]


def _spend(config: MoHConfig, layers: Sequence[Layer], costs: Sequence[Sequence[float]]) -> None:
    """Give the layers the budgets that cost least, of `active` heads on average."""
    budgets = [layer.budget for layer in layers]
    total = sum(budget.kept_groups for budget in budgets)
    if isinstance(config.active, float):
        of_all = config.active * sum(budget.num_groups for budget in budgets)
        total = round(of_all) - sum(len(budget.shared_groups) for budget in budgets)
    if total < len(layers):
        raise ValueError(
            f"active is {config.active}, which leaves {max(total, 0)} routed heads or groups to "
            f"{len(layers)} layers; each needs one"
        )
    for layer, kept in zip(layers, spend(costs, total, least=1), strict=True):
        groups = len(layer.budget.shared_groups) + kept
        active = layer.budget.heads_per_group * groups
        layer.budget = dataclasses.replace(layer.budget, active_heads=active)
