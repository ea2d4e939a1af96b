"""Linear layers, which a user may have adapted, hooked or quantised."""

from typing import TypeGuard

from jaxtyping import Float
from torch import Tensor, nn

from headwise.ops.linear import linear


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is a linear map and no more: no adapter, hook or quantised weight."""
    forward = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    hooks = forward or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and not hooks


def project(layer: nn.Module, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch O"]:
    """What the layer makes of x; by `ops.linear`, which may be faster, where it is plain."""
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias)
    return layer(x)
