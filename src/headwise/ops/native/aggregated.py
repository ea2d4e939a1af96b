"""Aggregated attention in C++ (kernels/aggregated*.h): window and pooled keys of what is on.

One softmax goes over a row's window and pooled keys, side by side. A pair of token and head that is
off is not gathered at all. The backward computes the weights again, so nothing but inputs is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.native import kernels
from headwise.ops.tensors import adjacent
from headwise.ops.window import inside

_OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor k_pool, Tensor v_pool, Tensor gate, Tensor local_bias, "
    "Tensor pool_bias, Tensor unit_q, Tensor learned_tokens, Tensor learned_bias, "
    "int height, int width, int window"
)
_NUM_TENSORS = 11


@torch.library.custom_op(
    "headwise::native_aggregated_attention", mutates_args=(), schema=f"({_OPERANDS}) -> Tensor"
)
def native_aggregated_attention(*operands: Any) -> Tensor:
    """y [B, T, H, C]. Gates and biases are float32; the other tensors share a dtype."""
    return kernels().aggregated_attention(*_laid_out(*operands))


@torch.library.custom_op(
    "headwise::native_aggregated_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_OPERANDS}) -> Tensor[]",
)
def native_aggregated_attention_backward(dy: Tensor, *operands: Any) -> list[Tensor]:
    """Gradients of all tensors but dy."""
    return kernels().aggregated_attention_backward(dy.contiguous(), *_laid_out(*operands))


def _laid_out(q: Tensor, *others: Any) -> list[Any]:
    """The operands as the kernels read them: keys and values may have strides, the rest may not."""
    keys_and_values, rest, sizes = others[:4], others[4 : _NUM_TENSORS - 1], others[-3:]
    return [
        q.contiguous(), *map(adjacent, keys_and_values), *(x.contiguous() for x in rest), *sizes
    ]  # fmt: skip


@native_aggregated_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@native_aggregated_attention_backward.register_fake
def _(dy: Tensor, *operands: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in operands[:_NUM_TENSORS]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.sizes = inputs[_NUM_TENSORS:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gradients = native_aggregated_attention_backward(dy, *ctx.saved_tensors, *ctx.sizes)
    return *gradients, None, None, None


native_aggregated_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.native_aggregated_attention, get_raw=True)
def _flops(q: Tensor, *args: Any, **_: Any) -> int:
    near, far = _pairs(q, *args)
    # A position of the window has two scores, one of them learned.
    return 2 * q.shape[3] * (3 * near + 2 * far)


@register_flop_formula(torch.ops.headwise.native_aggregated_attention_backward, get_raw=True)
def _backward_flops(dy: Tensor, q: Tensor, *args: Any, **_: Any) -> int:
    near, far = _pairs(q, *args)
    # Scores again, then the gradients of both operands of each product.
    return 2 * q.shape[3] * (8 * near + 5 * far)


def _pairs(q: Tensor, *args: Any) -> tuple[int, int]:
    """Pairs of a row that is on and a position of its window in the map, or a pooled key."""
    _k, _v, k_pool, _v_pool, gate, *_tensors, height, width, window = args
    rows = (gate != 0).sum((0, 2))
    near = inside((height, width), window, q.device).sum(1)
    return int((rows * near).sum()), int(rows.sum()) * k_pool.shape[1]
