"""The forward in C++ (ops/native/kernels), for CPUs, each expert fused; backward of `grouped`."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops import native
from headwise.ops.activations import Activation
from headwise.ops.experts import grouped

_ACTIVATIONS = ("silu", "relu")


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: Activation,
) -> Tensor:
    x, up_proj, down_proj = grouped.in_autocast(x, up_proj, down_proj)
    if not takes(x, down_proj, activation):
        raise ValueError(
            f"x {list(x.shape)} is {x.dtype} on {x.device}, down_proj {list(down_proj.shape)}, "
            f'activation {activation!r}; impl "native" takes float32 and bfloat16 of even widths '
            f'on CPUs with {" or ".join(_ACTIVATIONS)}; impl "grouped" takes all'
        )
    return native_mlp(x, weights, indices, up_proj, down_proj, activation)


def takes(x: Tensor, down_proj: Tensor, activation: Activation) -> bool:
    """Whether the kernel computes this."""
    even = down_proj.shape[1] % 2 == 0 and down_proj.shape[2] % 2 == 0
    return (
        x.device.type == "cpu" and x.dtype in native.DTYPES and even and activation in _ACTIVATIONS
    )


@torch.library.custom_op("headwise::native_mlp", mutates_args=())
def native_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """y [N, D] of `ops.expert_mlp`."""
    return native.kernels().expert_mlp(
        x.contiguous(), weights.float().contiguous(), indices.contiguous(), up.contiguous(),
        down.contiguous(), activation == "relu",
    )  # fmt: skip


@native_mlp.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


native_mlp.register_autograd(grouped.backward, setup_context=grouped.save)
register_flop_formula(torch.ops.headwise.native_mlp, get_raw=True)(grouped.flops)
