"""Fused kernels for CPUs in C++ (ops/native/kernels): FlashAttention's tiling over gathered rows.

They do what torch's own CPU kernels do, and in the backward with bfloat16 products; a few queries
against a long cache have a kernel of their own. Without a compiler nothing is lost but speed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops import native
from headwise.ops.attention import whole
from headwise.ops.attention.decode import is_decoding
from headwise.ops.attention.gathered import attention_flops, share_on
from headwise.ops.gradients import learns
from headwise.ops.tensors import adjacent

_MOST_CHANNELS = 1024
# On processors with matrix tiles (AMX), torch's own forward in bfloat16 is faster from this share
# of heads on; on others these kernels are, at every share (results/performance.csv).
_LARGEST_SHARE, _NEVER = 0.85, 2.0
_HAS_TILES = torch.cpu.get_capabilities().get("amx_bf16", False)


def head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    if not takes(q, k, v, gate, mask, bias):
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)} on {q.device}, mask given: {mask is not None}, bias "
            f'given: {bias is not None}; impl "native" takes float32 and bfloat16 with an even '
            f"number of channels up to {_MOST_CHANNELS} on CPUs, no bias, and a mask only where a "
            'few queries are decoded without gradients; impl "gathered" takes all'
        )
    if is_decoding(q, k, v, gate):
        return native_decode(q, k, v, gate.float(), causal, scale, mask)
    half = q.dtype == torch.bfloat16 and not learns(q, k, v, gate)
    limit = _LARGEST_SHARE if _HAS_TILES and half else _NEVER
    return native_attention(q, k, v, gate.float(), causal, scale, limit)[0]


def takes(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, mask: Tensor | None, bias: Tensor | None
) -> bool:
    """Whether the kernels compute this."""
    known = q.device.type == "cpu" and q.dtype in native.DTYPES
    channels = q.shape[-1] % 2 == 0 and q.shape[-1] <= _MOST_CHANNELS
    return known and channels and bias is None and (mask is None or is_decoding(q, k, v, gate))


@torch.library.custom_op("headwise::native_attention", mutates_args=())
def native_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, scale: float, limit: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C], and log2 of the sum of the scores' exponentials [B, T, H] in float64.

    From `limit`, a share of heads, on all are computed by torch; that is without a backward.
    """
    if limit <= 1 and share_on(gate) >= limit:
        y, lse = whole.forward(q, k, v, gate, causal, None, None, scale)
        return y, lse.double()
    return native.kernels().attention(
        q.contiguous(), adjacent(k), adjacent(v), gate.contiguous(), causal, scale
    )


@torch.library.custom_op("headwise::native_decode", mutates_args=())
def native_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool,
    scale: float,
    mask: Tensor | None,
) -> Tensor:
    """y [B, T, H, C] of a few queries; the mask is [B|1, H|1, T|1, S|1]."""
    return native.kernels().decode_attention(
        q.contiguous(), adjacent(k), adjacent(v), gate.contiguous(), causal, scale, mask
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
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate."""
    return native.kernels().attention_backward(
        dy.contiguous(), q.contiguous(), adjacent(k), adjacent(v), gate.contiguous(), y, lse,
        causal, scale,
    )  # fmt: skip


@native_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), gate.new_empty(gate.shape, dtype=torch.float64)


@native_decode.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@native_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gate))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate, ctx.causal, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate, *output)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = native_attention_backward(dy, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *gradients, None, None, None


native_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.native_attention, get_raw=True)
def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool,
    scale: float,
    limit: float,
    **_: Any,
) -> int:
    computed = gate != 0
    if limit <= 1 and share_on(gate) >= limit:
        computed = torch.ones_like(computed)
    return attention_flops(q, k, computed, causal)


@register_flop_formula(torch.ops.headwise.native_decode, get_raw=True)
def _decode_flops(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, *_: Any, **__: Any
) -> int:
    return attention_flops(q, k, gate != 0, causal)


@register_flop_formula(torch.ops.headwise.native_attention_backward, get_raw=True)
def _backward_flops(dy: Tensor, *args: Any, **_: Any) -> int:
    q, k, _v, gate, _y, _lse, causal, *_rest = args
    return attention_flops(q, k, gate != 0, causal) * 5 // 2
