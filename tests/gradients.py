"""Gradients of a model, with its activations kept and with them computed again."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from headwise.hf.checkpointing import checkpoint_activations


def assert_checkpointing_changes_none(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor]
) -> None:
    """Of the model that `build` returns, twice the same, from the loss of it."""
    gradients = []
    for prepare in (lambda _: None, checkpoint_activations):
        torch.manual_seed(0)
        model = build()
        prepare(model)
        loss(model).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(*gradients)
