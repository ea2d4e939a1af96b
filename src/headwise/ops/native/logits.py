"""Router logits of bfloat16 in C++ (kernels/logits.h), summed in float32. Forward only.

The operator is registered without `torch.library.custom_op`, whose wrapper costs a token time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.native import kernels

_LOGITS = "headwise::native_logits"
torch.library.define(_LOGITS, "(Tensor x, Tensor weight) -> Tensor")
# [N, K] in float32 of x [N, D] and weight [K, D] in bfloat16.
native_logits: Any = torch.ops.headwise.native_logits


@torch.library.impl(_LOGITS, "cpu")
def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return kernels().logits(x.contiguous(), weight.contiguous())


@torch.library.register_fake(_LOGITS)
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@register_flop_formula(native_logits)
def _flops(x: Any, weight: Any, **_: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]
