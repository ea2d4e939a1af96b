"""A linear map by oneDNN, which comes with torch, where torch's own choice is half as fast."""

from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from headwise.ops.gradients import is_watched, learns

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
    and where torch.compile, `torch.func` or another tensor type is at work, is torch's. Gradients
    of gradients are not computed otherwise.
    """
    operands = [x, weight] if bias is None else [x, weight, bias]
    enough = len(weight) >= _FEWEST_OUTPUTS and x.numel() * len(weight) >= _FEWEST_PRODUCTS
    if not enough or not _by_onednn(*operands):
        return functional.linear(x, weight, bias)
    if learns(*operands):
        return functional.linear(x.to_mkldnn(), weight, bias).to_dense()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(*operands: Tensor) -> bool:
    """Whether oneDNN takes these, and MKL would be slower."""
    return (
        all(x.dtype == torch.float32 and x.device.type == "cpu" for x in operands)
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
        and not is_watched(*operands)
        and _mkl_is_slow()
    )


@cache
def _mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor with AVX-512 that is not Intel's."""
    info = Path("/proc/cpuinfo")
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.cpu.get_capabilities().get("avx512_f", False)
    return both and wide and info.exists() and "GenuineIntel" not in info.read_text()
