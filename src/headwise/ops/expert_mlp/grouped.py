"""Sort the assignments once, then one matrix product per expert over its contiguous run of rows."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.activations import Activation, activate


def expert_mlp(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    *,
    activation: Activation,
) -> Tensor:
    top_k = indices.shape[1]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, up_proj, down_proj = x.to(dtype), up_proj.to(dtype), down_proj.to(dtype)
    experts, order = torch.sort(indices.flatten(), stable=True)
    bounds = torch.searchsorted(experts, torch.arange(up_proj.shape[0] + 1, device=experts.device))
    rows = x[order // top_k]
    hidden = activate(grouped_linear(rows, up_proj, bounds), activation, down_proj.shape[2])
    y = grouped_linear(hidden, down_proj, bounds)
    unsorted = torch.empty_like(y).index_copy(0, order, y).unflatten(0, (-1, top_k))
    return (unsorted * weights.to(y.dtype).unsqueeze(-1)).sum(1)


@torch.library.custom_op("headwise::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    """Rows bounds[e]..bounds[e+1] of x [M, I] times weight[e].T [I, O]; rows outside give 0."""
    edges = bounds.tolist()
    y = x.new_empty(x.shape[0], weight.shape[1])
    y[: edges[0]], y[edges[-1] :] = 0, 0
    for e, (start, end) in enumerate(pairwise(edges)):
        torch.mm(x[start:end], weight[e].T, out=y[start:end])
    return y


@torch.library.custom_op("headwise::grouped_linear_weight_grad", mutates_args=())
def grouped_linear_weight_grad(dy: Tensor, x: Tensor, bounds: Tensor) -> Tensor:
    """dW[e] = dy.T x over the rows of expert e: [E, O, I], 0 for an expert without rows."""
    edges = bounds.tolist()
    grad = x.new_empty(len(edges) - 1, dy.shape[1], x.shape[1])
    for e, (start, end) in enumerate(pairwise(edges)):
        torch.mm(dy[start:end].T, x[start:end], out=grad[e])
    return grad


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_linear_weight_grad.register_fake
def _(dy: Tensor, x: Tensor, bounds: Tensor) -> Tensor:
    return x.new_empty(bounds.shape[0] - 1, dy.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, bounds = ctx.saved_tensors
    dy = dy.contiguous()
    dx = grouped_linear(dy, weight.transpose(1, 2), bounds) if ctx.needs_input_grad[0] else None
    dw = grouped_linear_weight_grad(dy, x, bounds) if ctx.needs_input_grad[1] else None
    return dx, dw, None


grouped_linear.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.grouped_linear_weight_grad)
def _weight_grad_flops(dy: torch.Size, x: torch.Size, *_: object, **__: object) -> int:
    return 2 * dy[0] * dy[1] * x[1]


@register_flop_formula(torch.ops.headwise.grouped_linear)
def _grouped_linear_flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * x[0] * weight[1] * weight[2]
