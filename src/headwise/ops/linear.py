"""A linear map by oneDNN, which comes with torch, where torch's own choice is half as fast."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from headwise.ops.gradients import is_watched, learns
from headwise.ops.native.levels import cpuinfo, levels_here

# Below these, layouts and gradients cost more than is won.
_FEWEST_PRODUCTS = 2**23
_FEWEST_OUTPUTS = 64


def linear(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "O D"],
    bias: Float[Tensor, " O"] | None = None,
) -> Float[Tensor, "*batch O"]:
    """x Wᵀ + b; in float32 on processors that are not Intel's about twice as fast as torch's.

    torch multiplies float32 by Intel's MKL, which does without AVX-512 there. What MKL does well,
    and where torch.compile, `torch.func` or another tensor type is at work, is torch's.
    """
    operands = [x, weight] if bias is None else [x, weight, bias]
    if not _are_enough(x, weight) or not _for_onednn(*operands):
        return functional.linear(x, weight, bias)
    if learns(*operands):
        return _OneDNN.apply(x, weight, bias)
    return _by_onednn(x, weight, bias)


def _are_enough(x: Tensor, weight: Tensor) -> bool:
    # What torch.compile and torch.export trace must not depend on how many rows there are.
    many = not torch.compiler.is_compiling() and len(weight) >= _FEWEST_OUTPUTS
    return many and x.numel() * len(weight) >= _FEWEST_PRODUCTS


class _OneDNN(torch.autograd.Function):
    """The same with gradients, which are linear maps again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, drows = x.flatten(0, -2), dy.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            dx = linear(dy, weight.T) if of_x else None
            dweight = linear(drows.T, rows.T) if of_weight else None
        return dx, dweight, drows.sum(0) if of_bias else None


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _for_onednn(*operands: Tensor) -> bool:
    """Whether oneDNN takes these, and MKL would be slower."""
    # First whether torch.compile is at work: it cannot trace the questions about this machine.
    return (
        not is_watched(*operands)
        and _mkl_is_slow()
        and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in operands)
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor with AVX-512 that is not Intel's."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    known = cpuinfo()
    return both and "avx512" in levels_here() and known != "" and "GenuineIntel" not in known
