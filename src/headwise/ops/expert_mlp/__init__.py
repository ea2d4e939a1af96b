"""A mixture of expert MLPs on flat tokens: signature, checks and choice of implementation.

reference   A loop over tokens and choices: the specification.
grouped     One expert after the other over its rows, activations kept in the caches: for CPUs.
native      The same in C++, several experts at once, where `headwise compile` has built it.
grouped_mm  torch's grouped matrix product: for GPUs.
"""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.activations import Activation
from headwise.ops.choice import check_choice
from headwise.ops.expert_mlp import grouped, grouped_mm, native, reference
from headwise.ops.native import is_ready

Impl = Literal["auto", "reference", "grouped", "native", "grouped_mm"]

_IMPLEMENTATIONS = {
    "reference": reference.expert_mlp,
    "grouped": grouped.expert_mlp,
    "native": native.expert_mlp,
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
        weights: Weight of each choice, in any float dtype.
        indices: Chosen experts, 0..E-1; -1 sends the choice nowhere (padding).
        up_proj: First matrices of the experts, with (U = 2F) or without (U = F) gate.
        down_proj: Second matrices of the experts.
        activation: "silu", "gelu" or "relu".
        impl: "auto" is grouped_mm on CUDA devices, native on CPUs where it is built, grouped
            elsewhere and for what those do not take; a named one is that one or an error.

    Returns:
        y in x's dtype; 0 for a token whose choices are all -1.

    Raises:
        ValueError: If shapes do not fit, or activation or impl is unknown.

    Example (worked by hand): one expert, relu without gate, up 2, down 3, weight 1/2: x = 1 gives
    1/2 · 3 · relu(2) = 3.
    """
    check_choice("impl", impl, Impl)
    experts, _, hidden = down_proj.shape
    if (
        up_proj.shape[0] != experts
        or up_proj.shape[1] not in (hidden, 2 * hidden)
        or up_proj.shape[2] != x.shape[1]
    ):
        raise ValueError(
            f"up_proj has shape {list(up_proj.shape)}; with x {list(x.shape)} and down_proj "
            f"{list(down_proj.shape)} it must be "
            f"[{experts}, {hidden} or {2 * hidden}, {x.shape[1]}]"
        )
    if weights.shape != indices.shape or weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"weights and indices have shapes {list(weights.shape)} and {list(indices.shape)}; "
            f"both must be [{x.shape[0]}, K]"
        )
    compute = _IMPLEMENTATIONS[choose(x, down_proj, activation) if impl == "auto" else impl]
    return compute(x, weights, indices, up_proj, down_proj, activation=activation)


def choose(x: Tensor, down_proj: Tensor, activation: Activation) -> Impl:
    """The implementation that "auto" stands for."""
    if x.device.type == "cuda" and grouped_mm.takes(x, down_proj):
        return "grouped_mm"
    return "native" if native.takes(x, down_proj, activation) and is_ready() else "grouped"
