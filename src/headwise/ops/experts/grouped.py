"""Sort the assignments once, then one expert after the other over its contiguous run of rows.

An expert's rows, its hidden activations and their gradients are small enough to stay in the caches:
nothing of size N · K · F is ever stored. The backward computes the hidden activations again.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.activations import activate, activate_backward
from headwise.ops.dtypes import wide_dtype
from headwise.ops.experts.choices import known_choices
from headwise.ops.native.experts import native_mlp, native_mlp_backward

# Matrix products are compiled for each number of rows; multiples of this keep the numbers few.
_ROW_BLOCK = 16


@torch.library.custom_op("headwise::grouped_mlp", mutates_args=())
def grouped_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """y [N, D] of `ops.expert_mlp`."""
    y = x.new_zeros(x.shape, dtype=wide_dtype(x))
    for run in _runs(weights, indices, up.shape[0]):
        raised = x.index_select(0, run.tokens) @ up[run.expert].T
        hidden = activate(raised, activation, down.shape[2])
        out = (hidden @ down[run.expert].T)[: run.size]
        y.index_add_(0, run.tokens[: run.size], out * run.weights[: run.size])
    return y.to(x.dtype)


@torch.library.custom_op("headwise::grouped_mlp_backward", mutates_args=())
def grouped_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up and down; 0 for an expert without rows."""
    dx = x.new_zeros(x.shape, dtype=wide_dtype(x))
    dweights = x.new_zeros(weights.numel(), dtype=wide_dtype(x))
    dup, ddown = torch.zeros_like(up), torch.zeros_like(down)
    for run in _runs(weights, indices, up.shape[0]):
        e, size = run.expert, run.size
        rows, dout = (tensor.index_select(0, run.tokens) for tensor in (x, dy))
        rows[size:], dout[size:] = 0, 0
        raised = rows @ up[e].T
        hidden = activate(raised, activation, down.shape[2])
        # dy·(W h) = (Wᵀ dy)·h: the weight's gradient needs no output of the expert.
        dhidden = dout @ down[e]
        dweights[run.places[:size]] = (dhidden * hidden).sum(-1, dtype=wide_dtype(x))[:size]
        dhidden = (dhidden * run.weights).to(x.dtype)
        torch.mm((dout * run.weights).to(x.dtype).T, hidden, out=ddown[e])
        draised = activate_backward(dhidden, raised, activation, down.shape[2])
        torch.mm(draised.T, rows, out=dup[e])
        dx.index_add_(0, run.tokens[:size], (draised @ up[e])[:size].to(dx.dtype))
    return dx.to(x.dtype), dweights.view(weights.shape).to(weights.dtype), dup, ddown


class _Run(NamedTuple):
    """What one expert computes: `size` rows, filled up to a multiple of the row block.

    `places` are positions in the flattened choices [N·K], `tokens` rows of x; `weights` [rows, 1]
    are float32 or wider.
    """

    expert: int
    size: int
    places: Tensor
    tokens: Tensor
    weights: Tensor


def _runs(weights: Tensor, indices: Tensor, num_experts: int) -> Iterator[_Run]:
    if indices.numel() == 0:
        return
    experts, order = torch.sort(known_choices(indices, num_experts), stable=True)
    edges = torch.searchsorted(experts, torch.arange(num_experts + 1, device=experts.device))
    order = pad(order, (0, _ROW_BLOCK))
    tokens = order // indices.shape[1]
    weights = weights.flatten().to(wide_dtype(weights)).index_select(0, order).unsqueeze(1)
    for e, (start, end) in enumerate(pairwise(edges.tolist())):
        if start < end:
            stop = start + -(-(end - start) // _ROW_BLOCK) * _ROW_BLOCK
            yield _Run(e, end - start, order[start:stop], tokens[start:stop], weights[start:stop])


@grouped_mlp.register_fake
def _(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    return x.new_empty(x.shape)


def register_backward(backward: Any, forward: Any) -> None:
    """Let an op with `grouped_mlp`'s arguments learn by `backward`, which takes dy before them."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweights, dup, ddown = backward(dy, *ctx.saved_tensors, ctx.activation)
        return dx, dweights, None, dup, ddown, None

    @backward.register_fake
    def _(dy, x, weights, indices, up, down, activation):  # type: ignore[no-untyped-def]
        return tuple(tensor.new_empty(tensor.shape) for tensor in (x, weights, up, down))

    forward.register_autograd(gradients, setup_context=save)


register_backward(grouped_mlp_backward, grouped_mlp)
register_backward(native_mlp_backward, native_mlp)


@register_flop_formula(
    [torch.ops.headwise.grouped_mlp, torch.ops.headwise.native_mlp], get_raw=True
)
def forward_flops(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, *_: Any, **__: Any
) -> int:
    """Two for each weight of a choice that goes somewhere."""
    return 2 * int((indices >= 0).sum()) * (up[0].numel() + down[0].numel())


@register_flop_formula(
    [torch.ops.headwise.grouped_mlp_backward, torch.ops.headwise.native_mlp_backward], get_raw=True
)
def backward_flops(dy: Tensor, *args: Any, **_: Any) -> int:
    """Twice the forward, and the first product once more."""
    x, weights, indices, up, down, *_rest = args
    again = 2 * int((indices >= 0).sum()) * up[0].numel()
    return 2 * forward_flops(x, weights, indices, up, down) + again
