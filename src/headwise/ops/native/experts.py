"""A mixture of expert MLPs in C++ (kernels/experts.h): forward only, each expert in one go.

`experts.grouped` has the backward.
"""

from typing import Any

import torch
from torch import Tensor

from headwise.ops.native import kernels


@torch.library.custom_op("headwise::native_mlp", mutates_args=())
def native_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """y [N, D] of `ops.expert_mlp`; activation is "silu" or "relu"."""
    _check_indices(indices, len(up))
    return kernels().expert_mlp(
        x.contiguous(), weights.float().contiguous(), indices.contiguous(), up.contiguous(),
        down.contiguous(), activation == "relu",
    )  # fmt: skip


def _check_indices(indices: Tensor, experts: int) -> None:
    lowest, highest = torch.aminmax(indices)
    if lowest < -1 or highest >= experts:
        wrong = int(lowest if lowest < -1 else highest)
        raise ValueError(f"indices holds {wrong}; it must hold experts, 0..{experts - 1}, or -1")


@native_mlp.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
