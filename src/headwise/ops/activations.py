"""The non-linearities of an expert, by the names that configurations use."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu", "relu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def activate(up: Tensor, activation: Activation, hidden: int) -> Tensor:
    """[..., U] → [..., hidden]: act(gate)·up where U = 2·hidden (gate first), else act(up)."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {list(_ACTIVATIONS)}")
    act = _ACTIVATIONS[activation]
    if up.shape[-1] == hidden:
        return act(up)
    gate, value = up.chunk(2, dim=-1)
    return act(gate) * value
