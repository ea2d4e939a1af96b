"""A mixture of expert MLPs on flat tokens: signature, checks and choice of implementation.

reference   A loop over tokens and choices: the specification.
dense       Every expert on every token, by torch's own operators: skips nothing, goes everywhere.
grouped     One expert after the other over its rows, activations kept in the caches: for CPUs.
native      The same in C++, several experts at once, forward and backward, where `headwise compile`
            has built it.
grouped_mm  torch's grouped matrix product: for GPUs.
triton      Both products in one kernel, for narrow rows on CUDA devices.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.activations import Activation
from headwise.ops.choice import check_choice
from headwise.ops.dtypes import autocasts, in_autocast
from headwise.ops.experts import dense, grouped_mm, reference
from headwise.ops.experts.grouped import grouped_mlp
from headwise.ops.gpu import runs_triton
from headwise.ops.gradients import by_torch_alone, check_named
from headwise.ops.native import DTYPES, is_ready
from headwise.ops.native.experts import native_mlp
from headwise.ops.tensors import check_operands, check_same_device, check_same_dtype, check_tensor

Impl = Literal["auto", "reference", "dense", "grouped", "native", "grouped_mm", "triton"]

_NATIVE_ACTIVATIONS = ("silu", "relu")
_MOST_CHANNELS = 256  # of impl "triton", which keeps a row's sums in registers
_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.expert_mlp,
    "dense": dense.expert_mlp,
    "grouped": grouped_mlp,
    "native": native_mlp,
    "grouped_mm": grouped_mm.expert_mlp,
}


def expert_mlp(
    x: Float[Tensor, "N D"],
    weights: Float[Tensor, "N K"],
    indices: Int[Tensor, "N K"],
    up_proj: Float[Tensor, "E U D"],
    down_proj: Float[Tensor, "E D F"],
    *,
    activation: Activation = "silu",
    impl: Impl = "auto",
) -> Float[Tensor, "N D"]:
    """Weighted sum of the experts that each token was sent to.

        y[n] = sum_k weights[n,k] · down_e(hidden_e(x[n])),   e = indices[n,k]
        hidden = act(gate·x) · (up·x)     where U = 2F: the first F rows of up_proj are the gate
        hidden = act(up·x)                where U = F

    **Source**: MH-MoE, arXiv 2411.16205, section 2 (SwiGLU experts); arXiv 2404.15045, Eq. 4.
    No capacity and no dropping: a row depends on its own token only.

    Args:
        x: Tokens or sub-tokens.
        weights: Weight of each choice, in any float dtype; K may be 0. A choice of weight 0 goes
            nowhere, whatever its index: it computes nothing and has no gradient.
        indices: Chosen experts, 0..E-1, in any integer dtype; -1 sends the choice nowhere
            (padding).
        up_proj: First matrices of the experts, with (U = 2F) or without (U = F) gate.
        down_proj: Second matrices of the experts.
        activation: "silu", "gelu" or "relu".
        impl: "auto" is triton on CUDA devices for rows of up to 256 channels in half precision, and
            grouped_mm for others; native on CPUs where it is built; grouped elsewhere and where
            those cannot compute this; and dense for torch.export, `torch.func` and forward
            gradients. A named one is that one or an error.

    Returns:
        y in x's dtype; 0 for a token whose choices all go nowhere, also where it holds inf or NaN.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, indices holds something else (on a
            CUDA device torch's assertion says so later), activation or impl is unknown, or impl
            cannot compute this.

    Example (worked by hand): one expert, relu without gate, up 2, down 3, weight 1/2: x = 1 gives
    1/2 · 3 · relu(2) = 3.
    """
    check_choice("impl", impl, Impl)
    check_choice("activation", activation, Activation)
    _check(x, weights, indices, up_proj, down_proj)
    if x.numel() == 0 or indices.numel() == 0:
        return x.clone().zero_()
    if impl != "reference":
        x, up_proj, down_proj = in_autocast(x, up_proj, down_proj)
    impl = choose(x, down_proj, activation, impl)
    indices = indices.long().masked_fill(weights == 0, -1)
    if impl == "triton":
        from headwise.ops.experts import triton

        return triton.expert_mlp(x, weights, indices, up_proj, down_proj, activation)
    compute = _IMPLEMENTATIONS[impl]
    return compute(x, weights, indices, up_proj, down_proj, activation)


def choose(x: Tensor, down_proj: Tensor, activation: Activation, impl: Impl = "auto") -> Impl:
    """The implementation that "auto" stands for, or the named one.

    Args:
        x, down_proj: As `expert_mlp` has them, in the dtype of autocast where that is on.
        activation: "silu", "gelu" or "relu".
        impl: "auto" or a name.
    """
    if impl == "auto" and by_torch_alone():
        return "dense"
    check_named(impl, "dense", "reference")
    if impl == "auto":
        if x.device.type == "cuda" and grouped_mm.computes(x, down_proj):
            return "triton" if _triton_computes(x, down_proj) else "grouped_mm"
        return "native" if _native_computes(x, down_proj, activation) and is_ready() else "grouped"
    if impl == "native" and not _native_computes(x, down_proj, activation):
        raise ValueError(
            f"x {list(x.shape)} is {x.dtype} on {x.device}, down_proj {list(down_proj.shape)}, "
            f'activation {activation!r}; impl "native" takes float32 and bfloat16 of even widths '
            f'on CPUs with {" or ".join(_NATIVE_ACTIVATIONS)}; impl "grouped" takes all'
        )
    if impl == "triton" and not _triton_computes(x, down_proj):
        raise ValueError(
            f"x {list(x.shape)} and down_proj {list(down_proj.shape)} are {x.dtype} on {x.device}; "
            f'impl "triton" takes float16 and bfloat16 on CUDA devices, up to {_MOST_CHANNELS} '
            'channels, in widths that are multiples of 8; impl "grouped" takes all'
        )
    if impl == "grouped_mm" and not grouped_mm.computes(x, down_proj):
        raise ValueError(
            f"x {list(x.shape)} and down_proj {list(down_proj.shape)} have widths {x.shape[1]} and "
            f'{down_proj.shape[2]} in {x.dtype}; impl "grouped_mm" wants multiples of 16 bytes, '
            "and not torch.float64"
        )
    return impl


def _native_computes(x: Tensor, down_proj: Tensor, activation: Activation) -> bool:
    """Whether the kernel in C++ computes this, where it is built."""
    known = x.device.type == "cpu" and x.dtype in DTYPES and activation in _NATIVE_ACTIVATIONS
    return known and down_proj.shape[1] % 2 == 0 and down_proj.shape[2] % 2 == 0


def _triton_computes(x: Tensor, down_proj: Tensor) -> bool:
    """Whether the kernel in Triton computes this."""
    half = runs_triton(x) and x.dtype in (torch.float16, torch.bfloat16)
    return half and x.shape[1] <= _MOST_CHANNELS and grouped_mm.computes(x, down_proj)


def _check(x: Tensor, weights: Tensor, indices: Tensor, up_proj: Tensor, down_proj: Tensor) -> None:
    sizes = check_operands(
        {
            "x": (x, "N D"),
            "weights": (weights, "N K"),
            "up_proj": (up_proj, "E U D"),
            "down_proj": (down_proj, "E D F"),
        }
    )
    check_tensor("indices", indices, weights.shape, kind="whole")
    check_same_device(x=x, indices=indices)
    if not autocasts(x):
        check_same_dtype(x=x, up_proj=up_proj, down_proj=down_proj)
    experts, hidden = sizes["E"], sizes["F"]
    if experts == 0 or hidden == 0 or sizes["U"] not in (hidden, 2 * hidden):
        raise ValueError(
            f"up_proj has shape {list(up_proj.shape)}; with down_proj {list(down_proj.shape)} it "
            f"must be [{experts}, {hidden} or {2 * hidden}, {sizes['D']}], E and F at least 1"
        )
