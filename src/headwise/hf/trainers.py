"""Trainers of transformers that compute the loss themselves, from what a model gives."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwise.hf.conversion import Converted
from headwise.hf.recorder import record_routing
from headwise.hf.training_loss import loss_of, router_loss_coefficient


def add_balance_loss(trainer: Any) -> Any:
    """Let a trainer add the balance losses of a converted model to a loss that it computes itself.

    A Trainer that gives the labels to the model needs it not, for there the model's loss has them;
    nor do TRL's for SFT, DPO, KTO, GRPO and RLOO, which ask the model for its `aux_loss`. It is for
    label smoothing, `compute_loss_func`, reward models and sentence-transformers. What a model adds
    itself is not added again. With several forwards to a loss, theirs are averaged.

    Args:
        trainer: A Trainer of transformers, or of a library whose trainers are subclasses of that,
            of a converted model, of a wrapper such as PEFT's, or of a model with one inside.

    Returns:
        The same trainer.

    Raises:
        ValueError: If it is none, trains no converted model, or adds the `aux_loss` itself.

    Example:
        >>> headwise.add_balance_loss(SentenceTransformerTrainer(model, ...)).train()
    """
    # Imported here because it takes seconds.
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise ValueError(
            f"trainer is a {type(trainer).__name__}; it must be a Trainer of transformers"
        )
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            f"trainer is a {type(trainer).__name__}, which adds the model's aux_loss itself"
        )
    entry, routed = _converted_inside(trainer.model)
    compute = trainer.compute_loss

    @functools.wraps(compute)
    def compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        losses: list[Tensor] = []

        def add(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            # A model that gives a loss has added its own.
            trains = routed.training and torch.is_grad_enabled()
            if trains and routings and loss_of(output) is None:
                losses.append(routed.routing_loss(routings))

        with record_routing(entry) as routings:
            hook = entry.register_forward_hook(add)
            try:
                result = compute(model, inputs, *args, **kwargs)
            finally:
                hook.remove()
        if not losses:
            return result
        added = router_loss_coefficient(routed.config) * sum(losses) / len(losses)
        items = kwargs.get("num_items_in_batch")
        # Where Trainer does not divide the loss by the number of micro-batches.
        whole = items is not None and trainer.model_accepts_loss_kwargs
        if whole or trainer.compute_loss_func is not None:
            added = added / trainer.current_gradient_accumulation_steps
        return (result[0] + added, *result[1:]) if isinstance(result, tuple) else result + added

    trainer.compute_loss = compute_loss
    return trainer


def _converted_inside(model: nn.Module) -> tuple[nn.Module, Any]:
    """What is called with a batch, which may be a wrapper of PEFT, and the converted model."""
    for entry in model.modules():
        of_wrapper: Any = getattr(entry, "get_base_model", None)
        inside = entry if of_wrapper is None else of_wrapper()
        if isinstance(inside, Converted) and isinstance(inside, PreTrainedModel):
            return entry, inside
    raise ValueError(f"trainer trains a {type(model).__name__}, which holds no converted model")
