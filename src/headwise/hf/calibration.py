"""Which heads to share: those that a model misses most, instead of the first ones."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.hf import attention
from headwise.hf.auto import Routed
from headwise.hf.head_configs import MoHConfig
from headwise.hf.recorder import record_routing
from headwise.hf.surgery import attention_modules, build_routers
from headwise.nn import HeadBudget, QueryNormRouter
from headwise.ops import HeadRouting
from headwise.ops.choice import check_choice
from headwise.progress import followed

Measure = Literal["gradient", "loss", "query_norm"]
Batches = Sequence[Mapping[str, Tensor]]
_A_BATCH = 'a dict of what the model\'s forward takes, such as {"input_ids": ids, "labels": ids}'


def calibrate(
    model: PreTrainedModel, batches: Batches, config: MoHConfig, *, by: Measure = "gradient"
) -> MoHConfig:
    """The same configuration, which names the shared heads of every layer: the heaviest ones.

    What a head weighs depends on `by`:

        "gradient"    |∂L/∂g|, mean over batches: how steeply the loss L changes with the head's
                      gate g, at g = 1
        "loss"        how much the loss rises when this head alone is cut. It costs a forward for
                      every head; the gradient is its estimate
        "query_norm"  the mean norm of the head's queries, by which the router without parameters
                      chooses

    With `route_groups` a group weighs as much as its heads together, and whole groups are shared.

    **Source**: "gradient" is the head importance of arXiv 1905.10650, Eq. 2.
    **Deviates**: it is not normalised by layer, because heads compete within a layer only.

    Args:
        model: A model that is not converted yet; it stays as it was.
        batches: Arguments of its forward. All but "query_norm" need `labels`; padding has
            attention_mask 0.
        config: Says how many heads each layer shares.
        by: "gradient", "loss" or "query_norm".

    Returns:
        The configuration to give to `convert`.

    Raises:
        ValueError: If the model is none of transformers, is converted already or cannot be, there
            are no batches or it cannot read them, no head is shared, or a budget does not fit it.
    """
    check_choice("by", by, Measure)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}; it must be a transformers model")
    if isinstance(model, Routed):
        raise ValueError(f"{type(model).__name__} is converted already; calibrate the original")
    check_batches(batches, labelled=by != "query_norm")
    num_layers = len(attention_modules(model))
    config = config.resolve(num_layers)
    routers = build_routers(model, config, range(num_layers))
    budgets = [router.budget for router in routers.values()]
    if not any(budget.shared_heads for budget in budgets):
        of_fitted = "; headwise.fit fits its router" if config.router == "fitted" else ""
        raise ValueError(f"shared is 0 in every layer, so there is nothing to choose{of_fitted}")
    weights = [torch.zeros(budget.num_heads, dtype=torch.float64) for budget in budgets]
    training = model.training
    model.eval()
    try:
        with torch.set_grad_enabled(by == "gradient"):
            _MEASURES[by](model, batches, weights)
    finally:
        model.train(training)
    shared = tuple(_heaviest(w, budget) for w, budget in zip(weights, budgets, strict=True))
    return dataclasses.replace(config, shared=shared)


def check_batches(batches: Batches, *, labelled: bool) -> None:
    """Raises ValueError unless it is a list of arguments of a model's forward, with labels."""
    if not isinstance(batches, Sized) or isinstance(batches, Tensor | Mapping) or not len(batches):
        what = "empty" if isinstance(batches, Sequence) else f"a {type(batches).__name__}"
        raise ValueError(f"batches is {what}; it must be a list of at least one, each {_A_BATCH}")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or (labelled and "labels" not in batch):
            found = "no labels in a dict" if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"batches holds {found}; each must be {_A_BATCH}")
        labels = batch.get("labels")
        if labelled and isinstance(labels, Tensor) and bool((labels == -100).all()):
            raise ValueError(
                f"batches[{number}] has labels that are all -100, which counts for nothing; some "
                "must be tokens"
            )


def read_batch(model: Any, batch: Mapping[str, Any], number: int) -> Any:
    """What the model gives for batches[number].

    Raises:
        ValueError: If the model cannot read it, with the model's own message.
    """
    try:
        return model(**batch)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(
            f"{name} {list(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            for name, x in batch.items()
        )
        raise ValueError(
            f"{type(model).__name__} cannot read batches[{number}] ({shapes}): {error}"
        ) from error


def _heaviest(weights: Tensor, budget: HeadBudget) -> tuple[int, ...]:
    """The heads of the heaviest groups, ascending; of equal ones the first."""
    size = budget.heads_per_group
    groups = weights.unflatten(0, (-1, size)).sum(-1).sort(descending=True, stable=True).indices
    chosen = sorted(groups[: len(budget.shared_groups)].tolist())
    return tuple(size * group + i for group in chosen for i in range(size))


# Each of these adds to `weights`, one for every head of a layer, layer by layer.
def _add_query_norms(model: PreTrainedModel, batches: Batches, weights: list[Tensor]) -> None:
    all_on = [HeadBudget.resolve(len(w), shared=0, active=len(w)) for w in weights]
    routers = [QueryNormRouter(budget, scale_by_std=False) for budget in all_on]
    with routed_by(model, routers), record_routing(model) as routings:
        for i, batch in enumerate(followed(batches, "query norms", total=len(batches))):
            read_batch(model, batch, i)
            for total, routing in zip(weights, routings.values(), strict=True):
                norms = routing.logits if routing.mask is None else routing.logits[routing.mask]
                total += norms.flatten(end_dim=-2).sum(0, dtype=torch.float64).cpu()


def _add_rises_of_loss(model: PreTrainedModel, batches: Batches, weights: list[Tensor]) -> None:
    """Without the loss of the whole model: a constant does not change the order."""
    routers = [_Gated(len(w)) for w in weights]
    heads = [(layer, head) for layer, w in enumerate(weights) for head in range(len(w))]
    with routed_by(model, routers):
        for layer, head in followed(heads, "loss without each head", total=len(heads)):
            routers[layer].gates[head] = 0
            losses = (read_batch(model, batch, i).loss for i, batch in enumerate(batches))
            weights[layer][head] = sum(loss.double().item() for loss in losses)
            routers[layer].gates[head] = 1


def _add_slopes_of_loss(model: PreTrainedModel, batches: Batches, weights: list[Tensor]) -> None:
    routers = [_Gated(len(w)) for w in weights]
    gates = [router.gates.requires_grad_() for router in routers]
    with routed_by(model, routers):
        for i, batch in enumerate(followed(batches, "gradient of each head", total=len(batches))):
            # Only the gates: the gradients of the model's weights stay as they were.
            gradients = torch.autograd.grad(read_batch(model, batch, i).loss, gates)
            for total, gradient in zip(weights, gradients, strict=True):
                total += gradient.abs()


_MEASURES = {
    "gradient": _add_slopes_of_loss,
    "loss": _add_rises_of_loss,
    "query_norm": _add_query_norms,
}


class _Gated(QueryNormRouter):
    """The same gates for every token, at first all 1."""

    def __init__(self, num_heads: int):
        # Not all active by its budget, or attention would not ask it.
        super().__init__(HeadBudget.resolve(num_heads, shared=0, active=max(1, num_heads - 1)))
        self.gates = torch.ones(num_heads)

    def forward(
        self, q: Tensor, mask: Tensor | None = None, indices: Tensor | None = None
    ) -> HeadRouting:
        gates = self.gates.to(q.device).expand(q.shape[:-1])
        none = gates.new_zeros(*gates.shape[:-1], 0, dtype=torch.long)
        return HeadRouting(gates, none, gates, gates)


@contextmanager
def routed_by(
    model: PreTrainedModel, routers: Sequence[nn.Module], names: Sequence[str] | None = None
) -> Iterator[None]:
    """While inside, attention modules ask these routers; afterwards the model is as it was.

    Args:
        model: Not converted.
        routers: One for each of the modules.
        names: Of the modules; all by default.
    """
    found = attention_modules(model)
    modules: list[Any] = [found[name] for name in found if names is None or name in names]
    before = model.config._attn_implementation
    model.set_attn_implementation(attention.NAME)
    for module, router in zip(modules, routers, strict=True):
        module.router = router
    try:
        yield
    finally:
        for module in modules:
            del module.router
        model.set_attn_implementation(before)
