"""A mixture of expert MLPs in C++ (kernels/experts*.h), several experts at once."""

from typing import Any

import torch
from torch import Tensor

from headwise.ops.native import kernels


@torch.library.custom_op("headwise::native_mlp", mutates_args=())
def native_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """y [N, D] of `ops.expert_mlp`; activation is "silu" or "relu"."""
    return kernels().expert_mlp(*_operands(x, weights, indices, up, down), activation == "relu")


@torch.library.custom_op("headwise::native_mlp_backward", mutates_args=())
def native_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up and down; 0 for an expert without rows."""
    operands = _operands(x, weights, indices, up, down)
    dx, dweights, dup, ddown = kernels().expert_mlp_backward(
        dy.contiguous(), *operands, activation == "relu"
    )
    return dx, dweights.to(weights.dtype), dup, ddown


def _operands(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor
) -> list[Tensor]:
    _check_indices(indices, len(up))
    return [tensor.contiguous() for tensor in (x, weights.float(), indices, up, down)]


def _check_indices(indices: Tensor, experts: int) -> None:
    lowest, highest = torch.aminmax(indices)
    if lowest < -1 or highest >= experts:
        wrong = int(lowest if lowest < -1 else highest)
        raise ValueError(f"indices holds {wrong}; it must hold experts, 0..{experts - 1}, or -1")


@native_mlp.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
