"""Projections into heads and out of them in C++ (kernels/projection.h). Forward only.

They are registered without `torch.library.custom_op`, whose wrapper costs a decoded token more time
than its heads take.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.native import kernels

_PROJECT, _MERGE = "headwise::native_project", "headwise::native_merge"
torch.library.define(_PROJECT, "(Tensor x, Tensor weight, Tensor? bias, Tensor gate) -> Tensor")
torch.library.define(_MERGE, "(Tensor heads, Tensor weight, Tensor? bias) -> Tensor")

# Heads [N, H·C] of tokens x [N, D], weight [H·C, D] and gate [N, H].
native_project: Any = torch.ops.headwise.native_project
# Tokens [N, D] of heads [N, H, C] and weight [D, H·C].
native_merge: Any = torch.ops.headwise.native_merge


@torch.library.impl(_PROJECT, "cpu")
def _project(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor) -> Tensor:
    return kernels().project_heads(*_contiguous(x, weight, bias, gate))


@torch.library.impl(_MERGE, "cpu")
def _merge(heads: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return kernels().merge_heads(*_contiguous(heads, weight, bias))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


@torch.library.register_fake(_PROJECT)
@torch.library.register_fake(_MERGE)
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(native_project, get_raw=True)
def _flops_of_project(x: Tensor, weight: Tensor, bias: Any, gate: Tensor, **_: Any) -> int:
    return 2 * int((gate != 0).sum()) * weight.numel() // gate.shape[1]


@register_flop_formula(native_merge, get_raw=True)
def _flops_of_merge(heads: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(heads.any(-1).sum()) * weight.numel() // heads.shape[1]
