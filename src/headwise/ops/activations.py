"""The non-linearities of an expert, by the names that configurations use."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from headwise.ops.choice import check_choice

Activation = Literal["silu", "gelu", "relu"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "relu": relu,
}


def activate(up: Tensor, activation: Activation, hidden: int) -> Tensor:
    """[..., U] → [..., hidden]: act(gate)·up where U = 2·hidden (gate first), else act(up)."""
    check_choice("activation", activation, Activation)
    act = _ACTIVATIONS[activation]
    if up.shape[-1] == hidden:
        return act(up)
    gate, value = up.chunk(2, dim=-1)
    return act(gate) * value
