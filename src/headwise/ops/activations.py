"""The non-linearities of an expert, by the names that configurations use."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from headwise.ops.choice import check_choice

Activation = Literal["silu", "gelu", "relu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "relu": relu,
}
_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
}


def activate(up: Tensor, activation: str, hidden: int) -> Tensor:
    """[..., U] → [..., hidden]: act(gate)·up where U = 2·hidden (gate first), else act(up)."""
    check_choice("activation", activation, Activation)
    act = _ACTIVATIONS[activation]
    if up.shape[-1] == hidden:
        return act(up)
    gate, value = up.chunk(2, dim=-1)
    return act(gate) * value


def activate_backward(dy: Tensor, up: Tensor, activation: str, hidden: int) -> Tensor:
    """The gradient of `up` in `activate`, given that of its result."""
    backward = _BACKWARDS[activation]
    if up.shape[-1] == hidden:
        return backward(dy, up)
    gate, value = up.chunk(2, dim=-1)
    dgate = backward(dy * value, gate)
    return torch.cat([dgate, dy * _ACTIVATIONS[activation](gate)], dim=-1)
