"""Reentrant activation checkpointing: its first pass runs a layer without gradients.

torch gives gradients to the tensors that the checkpointed function returns, and to these only. A
routing is a tuple of tensors, so a routing that it returns has none.
"""

import sys
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointFunction

from headwise.ops.routing import Routing

R = TypeVar("R", bound=Routing)

_FIRST_PASS = CheckpointFunction.forward.__code__


def mark_first_pass(routing: R) -> R:
    """The same routing, marked if the first pass made it: a loss outside of it is then refused."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _in_first_pass():
        probabilities: Any = routing.probabilities
        probabilities.of_first_pass = True
    return routing


def check_keeps_gradients(routing: Routing) -> None:
    """Raises ValueError if a loss of the routing would train nothing, though it is to train."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if getattr(routing.probabilities, "of_first_pass", False):
        raise ValueError(
            "the routing comes out of reentrant activation checkpointing, through which a loss of "
            "it gives no gradient; use torch.utils.checkpoint.checkpoint(…, use_reentrant=False), "
            "or compute the loss in the checkpointed function and return it"
        )


def _in_first_pass() -> bool:
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not _FIRST_PASS:
        frame = frame.f_back
    return frame is not None
