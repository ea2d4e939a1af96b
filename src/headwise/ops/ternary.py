"""BitNet b1.58: weights of three values, activations of 8 bits, trained straight through.

Both are whole numbers times a scale. Products are taken of the whole numbers, in a float dtype, and
scaled afterwards: float32 adds them exactly in any order (up to 2**24 / 127 = 132,104 of them), so
a row's product depends neither on its batch mates nor on the machine, nor on how weights are kept.

**Source**: BitNet b1.58, arXiv 2402.17764, section 2, with the norm before every quantised product
of BitNet, arXiv 2310.11453, section 2. **Deviates**: the norm is RMS and has no parameters; scales
are at least 1e-5 (of activations: 1e-5 / 127) instead of having a small number added, as in the
code that transformers has.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from headwise.ops.dtypes import widened
from headwise.ops.fields import Index, check
from headwise.ops.gradients import learns
from headwise.ops.tensors import check_tensor

_LARGEST_LEVEL = 127
# A smaller mean or maximum counts as this much: a matrix of zeros stays 0, and still learns.
_LEAST = 1e-5
_NORM_EPSILON = 1e-6
_VALUES_PER_BYTE, _BITS = 4, 2


class Quantized(NamedTuple):
    """A tensor as whole numbers and what they are multiples of: levels · scale.

    Attributes:
        levels: Whole numbers in the tensor's float dtype: -1, 0, 1 of weights [*matrices, O, D],
            -127..127 of activations [*rows, D].
        scale: float32 or wider; of weights one a matrix [*matrices], of activations one a row
            [*rows, 1]. It has no gradient.
    """

    levels: Tensor
    scale: Tensor


def quantize_weight(weight: Float[Tensor, "*matrices O D"]) -> Quantized:
    """Each matrix as {-1, 0, 1} times the mean of its absolute values.

        s = mean |w|;   levels = round(clip(w / s, -1, 1));   backward: d(levels · s) / dw = 1

    **Source**: arXiv 2402.17764, Eq. 1 to 3; straight-through as in BitNet, arXiv 2310.11453.

    Example (worked by hand): [[4, -1], [0, 3]] has s = 2, so 4/2 and 3/2 are 1, -1/2 and 0 are 0
    (halves go to the even number): [[1, 0], [0, 1]] · 2.
    """
    check_tensor("weight", weight, ("...", "O", "D"))
    wide = widened(weight)
    scale = wide.detach().abs().mean(dim=(-2, -1), keepdim=True).clamp_min(_LEAST)
    levels = _round(wide / scale, bound=1)
    return Quantized(levels.to(weight.dtype), scale.squeeze((-2, -1)))


def quantize_activations(x: Float[Tensor, "*rows D"]) -> Quantized:
    """Each row as whole numbers of 8 bits, its largest entry as 127.

        s = max |x| / 127;   levels = round(x / s);   backward: d(levels · s) / dx = 1

    **Source**: arXiv 2402.17764, section 2 (no zero point); arXiv 2310.11453, Eq. 4.

    Example (worked by hand): [254, -3, 100] has s = 2: [127, -2, 50] (-1.5 goes to the even -2).
    """
    check_tensor("x", x, ("...", "D"))
    wide = widened(x)
    scale = wide.detach().abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST) / _LARGEST_LEVEL
    levels = _round(wide / scale, bound=_LARGEST_LEVEL)
    return Quantized(levels.to(x.dtype), scale)


def rms_norm(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """x / sqrt(mean x² + 1e-6) in each row, in float32 or wider; no weight. A row of 0 stays 0.

    Example (worked by hand): [3, -4] has the mean square 12.5, so it becomes [0.849, -1.131].
    """
    check_tensor("x", x, ("...", "D"))
    return functional.rms_norm(widened(x), x.shape[-1:], eps=_NORM_EPSILON)


def ternary_linear(
    x: Float[Tensor, "*rows D"], weight: Quantized, bias: Float[Tensor, "O"] | None = None
) -> Float[Tensor, "*rows O"]:
    """Norm, 8 bits, product with a ternary matrix, and the bias in full precision.

        y = quantize(norm(x)) · weightᵀ + b

    Args:
        x: Inputs.
        weight: [O, D], with one scale.
        bias: Added at the end.

    Returns:
        y in the dtype of x; of autocast, where that is on.

    Raises:
        ValueError: In float16; if x is no floating tensor as wide as the weight, the weight not
            quantised or not on the same device, or the bias not as long as it has rows.

    Example (worked by hand): x = [3, -3] is normed to [1, -1] = [127, -127] / 127. With the levels
    [[1, 0], [1, -1]] times 2 and no bias it gives [2, 4].
    """
    check("weight", weight, Quantized)
    check_tensor("weight.levels", weight.levels, ("O", "D"))
    check_tensor("x", x, ("...", weight.levels.shape[1]), like=weight.levels)
    if bias is not None:
        check_tensor("bias", bias, weight.levels.shape[:1], like=x)
    levels, scale = quantize_activations(rms_norm(x))
    product = functional.linear(levels.to(x.dtype), weight.levels)
    y = rescale(product, scale * weight.scale)
    return (y if bias is None else y + bias).to(product.dtype)


def rescale(product: Tensor, scale: Tensor) -> Tensor:
    """A product of levels times its scale, in float32 or wider.

    Raises:
        ValueError: In float16, where such products overflow: 516 · 127 is more than it holds.
    """
    if product.dtype == torch.float16:
        raise ValueError("the dtype is torch.float16; ternary layers take bfloat16 or float32")
    return widened(product) * scale


def pack(levels: Float[Tensor, "*rows D"]) -> UInt8[Tensor, "*rows bytes"]:
    """Ternary levels in 2 bits each, four a byte: -1, 0, 1 as 0, 1, 2, the first one lowest.

    Where 4 does not divide D, the last byte is filled up with zeros' codes.

    Raises:
        ValueError: If a value is none of -1, 0 and 1, or the levels are no floating tensor.

    Example (worked by hand): [-1, 0, 1, 1, -1] has the codes 0, 1, 2, 2, 0; filled up with 1, 1, 1
    they are the bytes 0 + 1·4 + 2·16 + 2·64 = 164 and 0 + 1·4 + 1·16 + 1·64 = 84.
    """
    check_tensor("levels", levels, ("...", "D"))
    # On the meta device there are no values to look at.
    if not levels.is_meta and not torch.isin(levels, levels.new_tensor([-1, 0, 1])).all():
        raise ValueError("levels holds values beside -1, 0 and 1; pack takes ternary levels only")
    filled = functional.pad(levels, (0, -levels.shape[-1] % _VALUES_PER_BYTE))
    codes = (filled + 1).to(torch.uint8).unflatten(-1, (-1, _VALUES_PER_BYTE))
    return (codes << _shifts(codes)).sum(-1, dtype=torch.uint8)


def unpack(
    packed: UInt8[Tensor, "*rows bytes"], size: int, *, dtype: torch.dtype
) -> Float[Tensor, "*rows D"]:
    """The inverse of `pack`: the first `size` levels of each row, in that dtype.

    Raises:
        ValueError: If packed is no uint8 tensor, or has not the bytes of such a size.

    Example (worked by hand): the bytes 164 and 84, of size 5, are [-1, 0, 1, 1, -1].
    """
    check("size", size, Index)
    check("dtype", dtype, torch.dtype)
    num_bytes = -(-size // _VALUES_PER_BYTE)
    check_tensor("packed", packed, ("...", num_bytes), kind="torch.uint8")
    codes = (packed.unsqueeze(-1) >> _shifts(packed)) & (2**_BITS - 1)
    return codes.flatten(-2)[..., :size].to(dtype) - 1


def _shifts(x: Tensor) -> Tensor:
    return torch.arange(0, _BITS * _VALUES_PER_BYTE, _BITS, dtype=torch.uint8, device=x.device)


def _round(x: Tensor, *, bound: int) -> Tensor:
    """The nearest whole number within ±bound; its gradient is that of x."""
    levels = x.detach().round().clamp(-bound, bound)
    # x less itself is exactly 0: the levels stay whole, and the gradient passes.
    return levels + (x - x.detach()) if learns(x) else levels
