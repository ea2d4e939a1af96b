"""Make experts of a pretrained model's MLPs by a little text, in closed form."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwise.hf.calibration import Batches
from headwise.hf.conversion import Conversion
from headwise.hf.expert_configs import FittedExperts, MoEConfig
from headwise.hf.fitting.grouping import grouped_by_activity
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
from headwise.hf.fitting.sites import Site
from headwise.hf.surgery import attention_modules, mlp_beside
from headwise.hf.upcycling import check_is_cut
from headwise.nn import HeadBudget
from headwise.ops.fields import check

# So many of the text's tokens say which neurons are active together.
_OF_ACTIVITY = 2048


def fit_experts(
    model: Any, batches: Batches, config: MoEConfig, *, layers: Sequence[int] | None = None
) -> FittedExperts:
    """Group the neurons of each MLP to experts, and fit a router that says which a token needs.

    With z the neurons (what `down_proj` reads) and M as in `headwise.fit`, the neurons of largest
    E[z²] M are on for every token: they become the shared expert. The others are grouped by which
    tokens they are active for, |z|. What an expert contributes to the loss, and the router and the
    gains that follow from it, are those of `headwise.fit` with experts in the place of heads.

    A model that is converted so loses far more than one with as large a share of its heads off: it
    is a start for tuning.

    **Source**: groups and shared neurons CMoE, arXiv 2502.04416; router and gains ours.

    Args:
        model: A model of transformers that is not converted yet, with gated MLPs without biases
            (gate_proj, up_proj, down_proj), as Llama's; it stays as it was.
        batches: Arguments of its forward, as `headwise.fit` takes them, with `labels` or without.
        config: With router "fitted". Its shared expert and experts together have the MLP's width.
        layers: Numbers of the layers to convert, counted from 0; all of them by default.

    Returns:
        What `convert(mlp=)` takes.

    Raises:
        ValueError: If the model is converted already, or its MLPs cannot be cut so; or if there are
            too few tokens (the message says how many are needed).
    """
    check("config", config, MoEConfig)
    check_can_be_fitted(model, config.router)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}; it must be a model of transformers")
    check_can_be_fitted_to(batches)
    found = _layers(model, config, layers)
    with evaluating(model):
        measure_metrics(model, batches, found)
        orders = _group(model, batches, found)
        fit_scores(model, batches, found)
        measure_gains(model, batches, found)
    return FittedExperts(
        config=config,
        orders=orders,
        routers={layer.number: layer.parameters() for layer in found},
        layers=None if layers is None else tuple(layer.number for layer in found),
    )


def _layers(model: Any, config: MoEConfig, layers: Sequence[int] | None) -> list[Layer]:
    names = list(attention_modules(model))
    _, chosen = Conversion(mlp=config, layers=layers).layers_of(len(names))
    with torch.device("meta"):
        mixture = config.build(model.config.hidden_size)
    shared = config.num_shared
    budget = HeadBudget.resolve(
        shared + config.num_experts, shared=shared, active=shared + config.top_k
    )
    found = []
    for number in chosen:
        mlp = model.get_submodule(mlp_beside(model, names[number]))
        check_is_cut(mixture, mlp)
        found.append(Layer(number, Site(mlp, mlp.down_proj), mlp.up_proj.in_features, budget))
    return found


def _group(model: Any, batches: Batches, layers: Sequence[Layer]) -> dict[int, Tensor]:
    """Put each layer's neurons in order, shared ones, then expert by expert; the order by layer."""
    profiles: list[list[Tensor]] = [[] for _ in layers]
    of_batch = math.ceil(_OF_ACTIVITY / (OF_FEW_NUMBERS * len(batches)))

    def see(_: int, i: int, x: Tensor, z: Tensor) -> None:
        profiles[i].append(z[:: max(1, len(z) // of_batch)][:of_batch].abs())

    run(model, batches, layers, see, "activity of neurons", share=OF_FEW_NUMBERS)
    orders = {}
    for layer, seen in zip(layers, profiles, strict=True):
        profile = torch.cat(seen)
        budget = layer.budget
        num_shared = profile.shape[-1] // budget.num_heads * budget.shared_heads
        weight = profile.float().square().mean(0) * layer.metric.diagonal()
        ranked = weight.argsort(descending=True, stable=True)
        shared, others = ranked[:num_shared], ranked[num_shared:].sort().values
        groups = grouped_by_activity(profile[:, others], budget.routed_heads)
        orders[layer.number] = torch.cat([shared, others[groups]])
        layer.arrange(orders[layer.number])
    return orders
