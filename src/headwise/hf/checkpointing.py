"""Activation checkpointing, under the name that the installed transformers has for it."""

from typing import Any

from transformers import PreTrainedModel

# The older name is gradient checkpointing; newer versions warn of it.
_RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
_NAME = "activation_checkpointing" if _RENAMED else "gradient_checkpointing"


def checkpoint_activations(model: Any, *, use_reentrant: bool = False) -> None:
    """A backward pass computes the activations of each layer again instead of keeping them."""
    getattr(model, f"{_NAME}_enable")({"use_reentrant": use_reentrant})


def keep_activations(model: Any) -> None:
    """The way back from `checkpoint_activations`."""
    getattr(model, f"{_NAME}_disable")()


def checkpointing_arguments(checkpointing: bool) -> dict[str, Any]:
    """What TrainingArguments takes for it."""
    return {_NAME: checkpointing, f"{_NAME}_kwargs": {"use_reentrant": False}}
