"""Projections into heads and out of them that skip what is off, in C++ (ops/native), for CPUs.

Without gradients only: training computes all heads' queries, which their gates' gradients need.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops import native
from headwise.ops.gradients import learns

# Gathering rows and weights of a head costs what so many rows of it do; see `pays`.
_FEWEST_ROWS = {torch.float32: 256, torch.bfloat16: 512}
_FEWEST_CHANNELS = 48


def pays(x: Tensor, weight: Tensor, *, head_dim: int, routed_heads: int, off: int) -> bool:
    """Whether the kernels are there, take this and are faster than computing all heads.

    Args:
        x: Tokens [B, T, D].
        weight: Of either projection.
        head_dim: Channels of a head.
        routed_heads: Heads that are on for some tokens.
        off: How many of these are off for a token.
    """
    known = x.device.type == "cpu" and x.dtype in native.DTYPES and weight.dtype == x.dtype
    even = head_dim % 2 == 0 and x.shape[-1] % 2 == 0
    narrowed = torch.is_autocast_enabled(x.device.type)
    if not known or not even or head_dim < _FEWEST_CHANNELS or narrowed or learns(x, weight):
        return False
    enough = x.shape[:-1].numel() * off >= _FEWEST_ROWS[x.dtype] * routed_heads
    return off > 0 and enough and native.is_ready()


def project_heads(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "HC D"],
    bias: Float[Tensor, " HC"] | None,
    gate: Float[Tensor, "B T H"],
) -> Float[Tensor, "B T H C"]:
    """W_h x + b_h for the heads whose gate is not 0, and 0 for the others."""
    heads = native_project(x.flatten(0, 1), weight, bias, gate.flatten(0, 1).float())
    return heads.view(*gate.shape, -1)


def merge_heads(
    heads: Float[Tensor, "B T H C"],
    weight: Float[Tensor, "D HC"],
    bias: Float[Tensor, " D"] | None,
    gate: Float[Tensor, "B T H"],
) -> Float[Tensor, "B T D"]:
    """The sum of W_h heads_h over the heads whose gate is not 0, plus b."""
    rows = heads.flatten(2).flatten(0, 1)
    y = native_merge(rows, weight, bias, gate.flatten(0, 1).float())
    return y.view(*gate.shape[:2], -1)


@torch.library.custom_op("headwise::native_project", mutates_args=())
def native_project(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """[N, H·C] of x [N, D] and gate [N, H]."""
    return native.kernels().project_heads(
        x.contiguous(), weight.contiguous(), bias, gate.contiguous()
    )


@torch.library.custom_op("headwise::native_merge", mutates_args=())
def native_merge(heads: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """[N, D] of heads [N, H·C] and gate [N, H]."""
    return native.kernels().merge_heads(
        heads.contiguous(), weight.contiguous(), bias, gate.contiguous()
    )


@native_project.register_fake
@native_merge.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(x), len(weight))


@register_flop_formula(torch.ops.headwise.native_project, get_raw=True)
@register_flop_formula(torch.ops.headwise.native_merge, get_raw=True)
def _flops(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, **_: Any) -> int:
    return 2 * int((gate != 0).sum()) * weight.numel() // gate.shape[1]
