"""Attention of the heads that are on, in Triton: what is off is neither read nor computed.

Per batch and head, the tokens that are on are ranked; a program takes consecutive ranks and
gathers their rows straight from q. No size depends on how many there are, so nothing waits for
the device: a program whose ranks do not exist leaves at once.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.head_attention.gathered import attention_flops
from headwise.ops.head_attention.triton_backward import keys_kernel, queries_kernel
from headwise.ops.head_attention.triton_decode import decode_attention
from headwise.ops.head_attention.triton_forward import forward_kernel
from headwise.ops.head_attention.triton_tiles import (
    FUSION,
    adjacent_channels,
    check_operands,
    expanded,
)

__all__ = ["decode_attention", "head_attention"]


class Tiling(NamedTuple):
    """Rows that a program holds, rows it reads in one step, and how it is launched."""

    own: int
    step: int
    num_warps: int
    num_stages: int


# Forward and backward, by channels. Compiled for sm_80 and sm_90, these keep (nearly) all values in
# registers; what they cost was not measured on a GPU yet.
_HALF = {
    64: (Tiling(128, 64, 4, 3), Tiling(64, 32, 4, 2)),
    128: (Tiling(128, 64, 8, 2), Tiling(64, 32, 8, 2)),
    256: (Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2)),
}
# Exact float32 products run outside the tensor cores and want small tiles.
_FLOAT = {
    64: (Tiling(32, 32, 8, 2), Tiling(32, 32, 8, 2)),
    128: (Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 2)),
    256: (Tiling(16, 16, 8, 2), Tiling(16, 16, 8, 2)),
}


def tiling(width: int, dtype: torch.dtype, backward: bool) -> Tiling:
    """The tiling for heads of `width` channels, padded to a power of two."""
    table = _FLOAT if dtype == torch.float32 else _HALF
    return table[max(width, 64)][backward]


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
    """Gated attention heads by Triton kernels, forward and backward.

    **Source**: MoH, arXiv 2410.11842, Eq. 4; the online softmax and the recomputed scores are
    FlashAttention's, arXiv 2205.14135 and 2307.08691.
    **Deviates**: rows are gathered by their gates, which changes no number.

    Raises:
        ValueError: If bias is given, or q's device, dtype or channels are not the kernels'.
    """
    if bias is not None:
        raise ValueError(
            f"bias has shape {list(bias.shape)}; impl='triton' takes none, impl='gathered' does"
        )
    check_operands(q)
    return triton_attention(q, k, v, gate, causal, mask, scale)[0]


@torch.library.custom_op("headwise::triton_attention", mutates_args=())
def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C], and log2 of the sum of the scores' exponentials [B, H, T] in float32.

    The second is 0 where a head is off or sees no key.
    """
    batch, queries, heads, channels = q.shape
    q, k, v = adjacent_channels(q, k, v)
    y, lse = q.new_zeros(q.shape), q.new_zeros(batch, heads, queries, dtype=torch.float32)
    positions, on_so_far = _ranked(gate)
    mask, mask_strides = expanded(mask, q, k)
    width = triton.next_power_of_2(channels)
    own, step, num_warps, num_stages = tiling(width, q.dtype, False)
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(queries, own) * batch * heads,)](
            q, k, v, gate, mask, positions, on_so_far, y, lse,
            q.stride(), k.stride(), v.stride(), gate.stride(), mask_strides, y.stride(),
            queries, k.shape[1], heads, heads // k.shape[2], scale,
            C=channels, WIDTH=width, ROWS=own, KEYS=step, CAUSAL=causal,
            num_warps=num_warps, num_stages=num_stages, **FUSION,
        )  # fmt: skip
    return y, lse


@torch.library.custom_op("headwise::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate."""
    batch, queries, heads, channels = q.shape
    keys, kv_heads = k.shape[1:3]
    dy, q, k, v, y = adjacent_channels(dy, q, k, v, y)
    dq, dk, dv = q.new_zeros(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dgate, delta = gate.new_zeros(gate.shape), torch.empty_like(lse)
    positions, on_so_far = _ranked(gate)
    mask, mask_strides = expanded(mask, q, k)
    width = triton.next_power_of_2(channels)
    own, step, num_warps, num_stages = tiling(width, q.dtype, True)
    launch = {"num_warps": num_warps, "num_stages": num_stages, **FUSION}
    inputs = (q, k, v, gate, mask, positions, on_so_far, dy, lse, delta)
    strides = (q.stride(), k.stride(), v.stride(), gate.stride(), mask_strides, dy.stride())
    sizes = (queries, keys, heads, heads // kv_heads, scale)
    shape = {"C": channels, "WIDTH": width, "CAUSAL": causal}
    with torch.cuda.device_of(q):
        queries_kernel[(triton.cdiv(queries, own) * batch * heads,)](
            *inputs, y, dq, dgate, *strides, y.stride(), dq.stride(), dgate.stride(), *sizes,
            **shape, ROWS=own, KEYS=step, **launch,
        )  # fmt: skip
        keys_kernel[(triton.cdiv(keys, own) * batch * kv_heads,)](
            *inputs, dk, dv, *strides, dk.stride(), dv.stride(), *sizes,
            **shape, ROWS=step, KEYS=own, **launch,
        )  # fmt: skip
    return dq, dk, dv, dgate


def _ranked(gate: Tensor) -> tuple[Tensor, Tensor]:
    """Per head [B, H, T]: positions of the tokens that are on, ascending, then of those that are
    off; and how many are on up to and including each token."""
    on = (gate != 0).transpose(1, 2).contiguous()
    on_so_far = on.cumsum(-1, dtype=torch.int32)
    tokens = torch.arange(on.shape[-1], dtype=torch.int32, device=gate.device)
    # A place for each token, the off ones at the end: no two writes meet.
    places = torch.where(on, on_so_far - 1, on_so_far[..., -1:] + tokens - on_so_far)
    positions = torch.empty_like(on_so_far)
    return positions.scatter_(-1, places.long(), tokens.expand_as(places)), on_so_far


@triton_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _channels = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)


@triton_attention_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, gate = (x.new_empty(x.shape) for x in (q, k, v, gate))
    return q, k, v, gate


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate, ctx.causal, mask, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate, *output, mask)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, gate, y, lse, mask = ctx.saved_tensors
    gradients = triton_attention_backward(dy, q, k, v, gate, y, lse, ctx.causal, mask, ctx.scale)
    return *gradients, None, None, None


triton_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.triton_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, *_: Any, **__: Any) -> int:
    return attention_flops(q, k, gate != 0, causal)


@register_flop_formula(torch.ops.headwise.triton_attention_backward, get_raw=True)
def _backward_flops(dy: Tensor, *args: Any, **_: Any) -> int:
    """Seven products instead of two: both kernels compute the scores and dy · v again."""
    q, k, _v, gate, _y, _lse, causal, *_rest = args
    return attention_flops(q, k, gate != 0, causal) * 7 // 2
