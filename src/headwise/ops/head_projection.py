"""Projections into heads and out of them that skip heads that are off, in C++, for CPUs.

They have no backward: training computes the queries of all heads, because the gradients of their
gates need them.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from headwise.ops.dtypes import autocasts
from headwise.ops.gradients import by_torch_alone
from headwise.ops.native import DTYPES, is_ready
from headwise.ops.native.projection import native_merge, native_project
from headwise.ops.tensors import check_operands, check_same_dtype

# Gathering the rows and weights of a head costs as much as computing so many of its rows.
_FEWEST_ROWS = {torch.float32: 256, torch.bfloat16: 512}
_FEWEST_CHANNELS = 48
# Of one token, the weights are read by all cores, and of the heads that are on alone. Below so many
# bytes of weights, Python costs more.
_FEWEST_BYTES = 2**17


def skips_faster(x: Tensor, weight: Tensor, *, head_dim: int, routed_heads: int, off: int) -> bool:
    """Whether the kernels are there, compute this and are faster than computing all heads.

    Where gradients are on, they do not.

    Args:
        x: Tokens [B, T, D], or their heads [B, T, H·C].
        weight: Of the projection.
        head_dim: Channels of a head.
        routed_heads: Heads that are on for some tokens only.
        off: How many of these are off for a token.
    """
    if not off or head_dim < _FEWEST_CHANNELS or torch.is_grad_enabled() or by_torch_alone():
        return False
    fits = x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]
    if not fits or not _has_kernel(x, head_dim, *weight.shape):
        return False
    rows = x.shape[:-1].numel()
    if rows == 1:
        enough = weight.nbytes >= _FEWEST_BYTES
    else:
        enough = rows * off >= _FEWEST_ROWS[x.dtype] * routed_heads
    return enough and not autocasts(x) and is_ready()


def _has_kernel(x: Tensor, *widths: int) -> bool:
    """Whether the kernels compute this: heads' channels and tokens' width are even."""
    even = all(width % 2 == 0 for width in widths)
    return x.device.type == "cpu" and x.dtype in DTYPES and even


def project_heads(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "HC D"],
    bias: Float[Tensor, " HC"] | None,
    gate: Float[Tensor, "B T H"],
) -> Float[Tensor, "B T H C"]:
    """W_h x + b_h for the heads whose gate is not 0, and 0 for the others."""
    _check({"x": (x, "B T D"), "weight": (weight, "HC D")}, bias, "HC", gate)
    heads = native_project(x.flatten(0, 1), weight, bias, gate.flatten(0, 1).float())
    return heads.view(*gate.shape, -1)


def merge_heads(
    heads: Float[Tensor, "B T H C"],
    weight: Float[Tensor, "D HC"],
    bias: Float[Tensor, " D"] | None,
) -> Float[Tensor, "B T D"]:
    """The sum of W_h heads_h over the heads that are not 0, as those that are off are, plus b."""
    _check({"heads": (heads, "B T H C"), "weight": (weight, "D HC")}, bias, "D")
    y = native_merge(heads.flatten(0, 1), weight, bias)
    return y.view(*heads.shape[:2], len(weight))


def _check(
    operands: dict[str, tuple[Tensor, str]],
    bias: Tensor | None,
    of_bias: str,
    gate: Tensor | None = None,
) -> None:
    others = {} if bias is None else {"bias": (bias, of_bias)}
    gates = {} if gate is None else {"gate": (gate, "B T H")}
    sizes = check_operands({**operands, **others, **gates})
    check_same_dtype(**{name: x for name, (x, _) in {**operands, **others}.items()})
    channels = sizes["HC"] // max(1, sizes["H"])
    if sizes["HC"] != sizes["H"] * sizes.get("C", channels):
        raise ValueError(
            f"weight has shape {list(operands['weight'][0].shape)}; its HC = {sizes['HC']} must be "
            f"H = {sizes['H']} heads of {sizes.get('C', 'so many')} channels"
        )
    name, (x, _) = next(iter(operands.items()))
    if not _has_kernel(x, channels, sizes["D"]):
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}; the kernels take float32 and "
            "bfloat16 of even widths, with an even number of channels a head, on CPUs"
        )
