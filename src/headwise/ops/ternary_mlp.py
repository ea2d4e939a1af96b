"""A mixture of ternary experts: inputs and hidden activations in 8 bits, matrices in three values.

The kernels of `expert_mlp` cannot quantise between the two matrices. Here the choices are sorted
once, each of the two products is one over all experts, and autograd does the rest.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwise.ops.activations import Activation, activate
from headwise.ops.dtypes import in_autocast
from headwise.ops.experts.choices import known_choices
from headwise.ops.grouped_product import grouped_product
from headwise.ops.ternary import (
    Quantized,
    quantize_activations,
    quantize_weight,
    rescale,
    rms_norm,
)


def quantize_experts(
    up_proj: Float[Tensor, "E U D"], down_proj: Float[Tensor, "E D F"]
) -> tuple[Quantized, Quantized]:
    """The matrices of experts, ternary; gate and up matrix have a scale each.

    Returns:
        up: levels [E, G, F, D], scale [E, G]; G is 2 (the gate first), or 1 where U = F.
        down: levels [E, D, F], scale [E].
    """
    up = quantize_weight(up_proj.unflatten(1, (-1, down_proj.shape[2])))
    return up, quantize_weight(down_proj)


def ternary_mlp(
    x: Float[Tensor, "N D"],
    weights: Float[Tensor, "N K"],
    indices: Int[Tensor, "N K"],
    up: Quantized,
    down: Quantized,
    *,
    activation: Activation = "silu",
) -> Float[Tensor, "N D"]:
    """`ops.expert_mlp` with ternary matrices, and a norm and 8 bits before each.

        y[n] = sum_k weights[n,k] · down_e(q(norm(hidden_e(q(norm(x[n])))))),   e = indices[n,k]

    **Source**: MH-MoE, arXiv 2411.16205 (its models with BitNet); q and the ternary matrices are
    those of `ops.ternary`.

    Args:
        x: Tokens or sub-tokens.
        weights: Weight of each choice, in any float dtype.
        indices: Chosen experts, 0..E-1; -1 sends the choice nowhere (padding).
        up, down: As `quantize_experts` gives them.
        activation: "silu", "gelu" or "relu".

    Returns:
        y in x's dtype; 0 for a token whose choices are all -1.

    Raises:
        ValueError: In float16, or if activation is unknown.

    Example (worked by hand): one expert, relu without gate, up 2, down 3, weight 1/2: every x above
    0 is normed to 1, and its hidden 2 to 1 again: 1/2 · 3 = 1.5.
    """
    num_experts, _, hidden_dim, _ = up.levels.shape
    top_k = indices.shape[1]
    # Choices that go nowhere come last.
    experts, order = torch.sort(known_choices(indices, num_experts), stable=True)
    each = torch.arange(num_experts, device=experts.device)
    ends = torch.searchsorted(experts, each, right=True).to(torch.int32)
    tokens, own = order // top_k, experts.clamp(max=num_experts - 1)

    levels, scale = quantize_activations(rms_norm(x))
    rows, matrices = in_autocast(levels.to(x.dtype).index_select(0, tokens), up.levels)
    product = grouped_product(rows, matrices.flatten(1, 2), ends).unflatten(1, (-1, hidden_dim))
    raised = rescale(product, (scale[tokens] * up.scale[own]).unsqueeze(-1))
    hidden = activate(raised.flatten(1), activation, hidden_dim)

    levels, scale = quantize_activations(rms_norm(hidden))
    rows, matrices = in_autocast(levels.to(x.dtype), down.levels)
    product = grouped_product(rows, matrices, ends)
    out = rescale(product, scale * down.scale[own].unsqueeze(-1))
    unsorted = torch.empty_like(out).index_copy(0, order, out).view(*indices.shape, x.shape[1])
    return (unsorted * weights.unsqueeze(-1)).sum(1).to(product.dtype)
