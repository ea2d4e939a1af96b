"""Router logits of bfloat16 in C++ (kernels/logits.h), summed in float32. Forward only."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.native import kernels


@torch.library.custom_op("headwise::native_logits", mutates_args=())
def native_logits(x: Tensor, weight: Tensor) -> Tensor:
    """[N, K] in float32 of x [N, D] and weight [K, D] in bfloat16."""
    return kernels().logits(x.contiguous(), weight.contiguous())


@native_logits.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=torch.float32)


@register_flop_formula(torch.ops.headwise.native_logits)
def _flops(x: Any, weight: Any, **_: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]
