"""Projections into heads and out of them in C++ (kernels/projection.h). Forward only."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.native import kernels


@torch.library.custom_op("headwise::native_project", mutates_args=())
def native_project(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """Heads [N, H·C] of tokens x [N, D], weight [H·C, D] and gate [N, H]."""
    return kernels().project_heads(*_contiguous(x, weight, bias, gate))


@torch.library.custom_op("headwise::native_merge", mutates_args=())
def native_merge(heads: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    """Tokens [N, D] of heads [N, H·C], weight [D, H·C] and gate [N, H]."""
    return kernels().merge_heads(*_contiguous(heads, weight, bias, gate))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


@native_project.register_fake
@native_merge.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(x), len(weight))


@register_flop_formula(
    [torch.ops.headwise.native_project, torch.ops.headwise.native_merge], get_raw=True
)
def _flops(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, **_: Any) -> int:
    return 2 * int((gate != 0).sum()) * weight.numel() // gate.shape[1]
