"""Logits of routers: products in float32 or wider, whatever the dtype of what they read."""

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.ops.dtypes import wide_dtype, without_autocast
from headwise.ops.gradients import by_torch_alone, learns
from headwise.ops.linear import linear
from headwise.ops.native import is_ready
from headwise.ops.native.logits import native_logits
from headwise.ops.tensors import check_tensor


def router_logits(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "K D"]) -> Tensor:
    """x Wᵀ [*batch, K] in float32 or wider.

    Products of bfloat16 are exact in float32; sums and results would not be in bfloat16, where a
    quarter of the tokens tie. On CPUs a kernel (native/kernels/logits.h) reads bfloat16 as it is.
    """
    check_tensor("weight", weight, ("K", "D"))
    check_tensor("x", x, ("...", weight.shape[1]), like=weight)
    narrow = x.dtype == weight.dtype == torch.bfloat16 and x.shape[-1] % 2 == 0
    plain = not learns(x, weight) and not by_torch_alone()
    if narrow and x.device.type == "cpu" and plain and is_ready():
        rows = x.reshape(-1, x.shape[-1])
        return native_logits(rows, weight).view(*x.shape[:-1], len(weight))
    dtype = wide_dtype(x)
    # Autocast would bring the logits back to bfloat16.
    with without_autocast(x):
        return linear(x.to(dtype), weight.to(dtype))
