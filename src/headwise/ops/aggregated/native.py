"""Fused kernels for CPUs in C++ (ops/native/kernels): window and pooled keys of what is on.

One softmax over a row's window and pooled keys, side by side; a pair of token and head that is off
is not gathered at all. The backward computes the weights again, so nothing but inputs is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops import native
from headwise.ops.aggregated.window import inside
from headwise.ops.tensors import adjacent


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    gate: Tensor,
    *,
    size: tuple[int, int],
    window: int,
    local_bias: Tensor,
    pool_bias: Tensor,
    unit_q: Tensor,
    learned_tokens: Tensor,
    learned_bias: Tensor,
) -> Tensor:
    if not takes(q):
        raise ValueError(
            f'q is {q.dtype} {list(q.shape)} on {q.device}; impl "native" takes float32 and '
            'bfloat16 with an even number of channels on CPUs; impl "dense" takes all'
        )
    return native_aggregated_attention(
        q, k, v, k_pool, v_pool, gate.float(), local_bias.float(), pool_bias.float(), unit_q,
        learned_tokens.to(q.dtype), learned_bias.float(), *size, window,
    )  # fmt: skip


def takes(q: Tensor) -> bool:
    """Whether the kernels compute this."""
    return q.device.type == "cpu" and q.dtype in native.DTYPES and q.shape[3] % 2 == 0


@torch.library.custom_op("headwise::native_aggregated_attention", mutates_args=())
def native_aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    gate: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    unit_q: Tensor,
    learned_tokens: Tensor,
    learned_bias: Tensor,
    height: int,
    width: int,
    window: int,
) -> Tensor:
    """y [B, T, H, C]."""
    return native.kernels().aggregated_attention(
        q.contiguous(), *map(adjacent, (k, v, k_pool, v_pool)), gate.contiguous(),
        local_bias.contiguous(), pool_bias.contiguous(), unit_q.contiguous(),
        learned_tokens.contiguous(), learned_bias.contiguous(), height, width, window,
    )  # fmt: skip


@torch.library.custom_op("headwise::native_aggregated_attention_backward", mutates_args=())
def native_aggregated_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    gate: Tensor,
    local_bias: Tensor,
    pool_bias: Tensor,
    unit_q: Tensor,
    learned_tokens: Tensor,
    learned_bias: Tensor,
    height: int,
    width: int,
    window: int,
) -> list[Tensor]:
    """Gradients of all tensors but dy."""
    return native.kernels().aggregated_attention_backward(
        dy.contiguous(), q.contiguous(), *map(adjacent, (k, v, k_pool, v_pool)), gate.contiguous(),
        local_bias.contiguous(), pool_bias.contiguous(), unit_q.contiguous(),
        learned_tokens.contiguous(), learned_bias.contiguous(), height, width, window,
    )  # fmt: skip


@native_aggregated_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@native_aggregated_attention_backward.register_fake
def _(dy: Tensor, *args: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in args[:11]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, height, width, window = inputs
    ctx.sizes = height, width, window
    ctx.save_for_backward(*tensors)


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
