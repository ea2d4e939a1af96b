"""Attention of the heads that are on, in C++ (kernels/attention*.h): FlashAttention's tiling.

The kernels gather the rows that are on. They do what torch's own CPU kernels do for all rows, and
in the backward they multiply in bfloat16 where the inputs are bfloat16. What a row does not see is
not computed, but in steps of keys of which it sees some.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.gates import attention_flops, flops_of_what_is_on, share_on
from headwise.ops.native import kernels
from headwise.ops.plain_attention import Operands, attend_all, differentiable_attention_gradients
from headwise.ops.tensors import in_words

# On processors with matrix tiles (AMX), torch's own forward in bfloat16 is faster from this share
# of heads on, of few keys earlier: half of the heads take 0.72 to 0.89 of its time at 512, 0.45 at
# 4,096 (results/performance_amx.csv). On others these kernels are faster at every share.
_LARGEST_SHARE, _OF_FEW_KEYS, _FEW_KEYS, _NEVER = 0.85, 0.6, 512, 2.0
_HAS_TILES = torch.cpu.get_capabilities().get("amx_bf16", False)


def largest_share(dtype: torch.dtype, keys: int, *, learning: bool) -> float:
    """Share of heads on up to which the kernels are faster than torch's; above 1 they always are.

    While something is learned they always compute, because their backward needs their sums.
    """
    if learning or not _HAS_TILES or dtype != torch.bfloat16:
        return _NEVER
    return _OF_FEW_KEYS if keys <= _FEW_KEYS else _LARGEST_SHARE


@torch.library.custom_op("headwise::native_attention", mutates_args=())
def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool,
    spans: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C], and log2 of the sum of the scores' exponentials [B, T, H] in float64.

    Gates are float32, and so is the bias, which gets no gradient. Where the share of heads on
    reaches `limit`, torch computes all of them. There is no backward then.
    """
    if limit <= 1 and share_on(gate) >= limit:
        y, lse = attend_all(Operands(q, k, v, gate, causal, scale=scale))
        return y, lse.double()
    return kernels().attention(
        q.contiguous(),
        in_words(k),
        in_words(v),
        gate.contiguous(),
        causal,
        scale,
        spans,
        mask,
        bias,
    )


@torch.library.custom_op("headwise::native_attention_backward", mutates_args=())
def native_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    spans: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate."""
    return kernels().attention_backward(
        dy.contiguous(), q.contiguous(), in_words(k), in_words(v), gate.contiguous(), y, lse,
        causal, scale, spans, mask, bias,
    )  # fmt: skip


@native_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), gate.new_empty(gate.shape, dtype=torch.float64)


@native_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gate))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate, ctx.causal, spans, mask, bias, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate, *output, spans, mask, bias)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *rows, spans, mask, bias = ctx.saved_tensors
    if torch.is_grad_enabled():
        q, k, v, gate = rows[:4]
        x = Operands(q, k, v, gate, ctx.causal, mask, bias, ctx.scale)
        return *differentiable_attention_gradients(dy, x, spans)[:4], *[None] * 6
    gradients = native_attention_backward(dy, *rows, ctx.causal, spans, mask, bias, ctx.scale)
    return *gradients, *[None] * 6


native_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.native_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, *args: Any, **_: Any) -> int:
    _v, gate, causal, *_seen, _scale, limit = args
    computed = gate != 0
    if limit <= 1 and share_on(gate) >= limit:
        computed = torch.ones_like(computed)
    return attention_flops(q, k, computed, causal)


@register_flop_formula(torch.ops.headwise.native_attention_backward, get_raw=True)
def _backward_flops(dy: Tensor, *args: Any, **_: Any) -> int:
    return flops_of_what_is_on(*args[:4], args[6]) * 5 // 2
