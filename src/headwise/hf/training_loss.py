"""The balance losses of routers join the loss that a transformers model gives in training.

As mixtures of experts of transformers do it: the output has an `aux_loss`, which is in the model's
loss, too, times `config.router_aux_loss_coef`. Trainers that compute the loss themselves, such as
TRL's, ask for it by `output_router_logits=True` and add it.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import ModelOutput

from headwise.hf.recorder import collect_routings, is_collected, is_collected_for_loss
from headwise.nn import Router
from headwise.nn.expert_routers import keep_loads, move_biases
from headwise.ops import Routing

# What makes a model of transformers compute its loss, beside what is called labels.
_OTHER_TARGETS = ("start_positions", "bool_masked_pos", "return_loss", "future_values")


def with_routing_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model that has a `routing_loss`, which joins its loss in training.

    Where the model computes no loss, because the caller does it from the logits, and the caller
    does not ask for the `aux_loss` either, there is none to join: the first such forward of a model
    warns of it.
    """
    names = list(inspect.signature(forward).parameters)
    targets = [name for name in names if "label" in name or name in _OTHER_TARGETS]
    takes_asked = "output_router_logits" in names

    # `wraps` keeps the signature, by which Trainer and generate find out what a model takes.
    @functools.wraps(forward)
    def routed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(names[1:], args, strict=False)) | kwargs
        asked = (kwargs.get if takes_asked else kwargs.pop)("output_router_logits", None)
        has_targets = any(kwargs.get(name) is not None for name in targets)
        coefficient = router_loss_coefficient(self.config)
        if (
            coefficient == 0
            or is_collected_for_loss(self)
            or not (asked or (asked is None and has_targets and self.training))
        ):
            return forward(self, **kwargs)
        if self.training:
            # Not after the last forward, whose backward pass may compute layers again.
            move_biases(self)
        routings: dict[str, Routing] = {}
        with collect_routings(self, routings, kwargs.get("attention_mask"), for_loss=True):
            output = forward(self, **kwargs)
        if not routings:
            return output
        if self.training:
            keep_loads(self, routings)
        added = self.routing_loss(routings)
        if loss_of(output) is not None:
            output = _with_loss(output, coefficient * added * _share_of_batch(self, kwargs))
        elif has_targets and not asked:
            _warn_of_missing_loss(type(self).__name__)
            return output
        return _with_aux_loss(output, added / _coefficient_of_original(self.config))

    return routed_forward


def bound_with_routing_loss(model: PreTrainedModel, forward: Callable[..., Any]) -> Any:
    """What to keep as `model.forward` when somebody puts a forward of their own there."""

    @functools.wraps(forward)
    def of_model(_: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    # With the model before the arguments, as functions of a class have it.
    own = inspect.signature(forward)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    of_model.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]
    return MethodType(with_routing_loss(of_model), model)


def router_loss_coefficient(config: Any) -> float:
    """By what the balance losses are multiplied before they join the model's loss; 0 for off."""
    coefficient: float = getattr(config.get_text_config(), "router_aux_loss_coef", 1.0)
    return coefficient / _coefficient_of_original(config)


def _coefficient_of_original(config: Any) -> float:
    """That of a mixture which the model had before: it is for those experts' loss, not for ours."""
    text = config.get_text_config()
    is_of_original = hasattr(type(text), "router_aux_loss_coef")
    return (text.router_aux_loss_coef or 1.0) if is_of_original else 1.0


def _share_of_batch(model: PreTrainedModel, kwargs: dict[str, Any]) -> Tensor | int:
    """Under gradient accumulation the model's loss is a share of the whole batch's; so is ours."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    labels = kwargs.get("start_positions") if labels is None else labels
    if items is None or labels is None:
        return 1
    # Where the label of a token is compared with what the token before it predicts.
    shifted = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    counted = labels[..., 1:] if shifted else labels
    return (counted != -100).sum() / items


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model gives: by its name, or first in a tuple."""
    if isinstance(output, ModelOutput):
        return output.get("loss")
    first = output[0] if isinstance(output, tuple) else output
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def _with_loss(output: Any, added: Tensor) -> Any:
    if isinstance(output, Tensor):
        return output + added
    if isinstance(output, tuple):
        return (output[0] + added, *output[1:])
    output.loss = output.loss + added
    return output


def _with_aux_loss(output: Any, added: Tensor) -> Any:
    """The output with an `aux_loss`, on top of one that it has; a tuple has no place for it."""
    if not isinstance(output, ModelOutput):
        return output
    if not hasattr(output, "aux_loss"):
        if torch.compiler.is_compiling():  # which makes no classes
            return output
        kind: Any = type(output)
        return _with_field(kind)(**output, aux_loss=added)
    output.aux_loss = added if output.aux_loss is None else output.aux_loss + added
    return output


@functools.cache
def _with_field(kind: Any) -> Any:
    """The class of outputs with an `aux_loss`."""
    field = ("aux_loss", Tensor | None, dataclasses.field(default=None))
    return dataclasses.make_dataclass(f"Routed{kind.__name__}", [field], bases=(kind,))


def watch_training(model: nn.Module) -> None:
    """Let the first router warn, once, if it is trained and nobody collects what routers decide.

    It is the router that watches, because a trainer may call a part of the model, or give the whole
    a forward of its own.
    """
    router = next((m for m in model.modules() if isinstance(m, Router)), None)
    if router is not None:
        router.register_forward_pre_hook(functools.partial(_look_after, type(model).__name__))


def _look_after(model: str, router: Any, _: Any) -> None:
    # What torch.compile traces cannot warn.
    if torch.compiler.is_compiling() or not (router.training and torch.is_grad_enabled()):
        return
    # In a backward pass activation checkpointing computes layers again, which nobody collects.
    in_backward = torch._C._current_graph_task_id() >= 0
    if not (in_backward or is_collected(router) or getattr(router, "has_warned", False)):
        router.has_warned = True
        _warn_of_missing_loss(model)


def _warn_of_missing_loss(model: str) -> None:
    warnings.warn(
        f"{model} is in training, but the model computes no loss that its routers' balance losses "
        "could join, because the caller computes it; so nothing balances them. To balance them, "
        "call `headwise.add_balance_loss(trainer)` before a trainer of transformers trains; in a "
        "loop of your own run the forward inside `with headwise.record_routing(model) as "
        "routings:` and add `model.routing_loss(routings)` to your loss (with bias_rate, also call "
        "`headwise.update_biases(model, routings)` after the step); not to, convert with "
        "balance_coefficient 0 (and z_loss_coefficient 0); where nothing is trained, call eval()",
        UserWarning,
        stacklevel=3,
    )
