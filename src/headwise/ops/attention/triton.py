"""Attention of the heads that are on, in Triton: what is off is neither read nor computed.

In each batch entry and head, the tokens that are on are ranked. A program computes consecutive
ranks and gathers their rows straight from q. No size depends on how many tokens are on, so nothing
waits for the device: a program whose ranks do not exist returns at once.
"""

from typing import Any, Literal, get_args

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.attention.triton_backward import keys_kernel, queries_kernel
from headwise.ops.attention.triton_decode import decode_attention
from headwise.ops.attention.triton_forward import forward_kernel
from headwise.ops.attention.triton_ranks import ranked
from headwise.ops.attention.triton_tiles import described, expanded
from headwise.ops.gates import flops_of_what_is_on
from headwise.ops.plain_attention import Operands, differentiable_attention_gradients
from headwise.ops.tensors import adjacent
from headwise.ops.triton_rows import FUSION, Tiling

__all__ = ["decode_attention", "head_attention"]


# Forward, backward of queries, backward of keys, by channels: the fastest on an H100 at T = 16,384
# with half of the heads on (benchmarks/gpu/tiles.py); those of 256 channels were not measured.
_HALF = {
    64: (Tiling(64, 128, 4, 3), Tiling(64, 128, 4, 3), Tiling(64, 128, 4, 2)),
    128: (Tiling(64, 64, 4, 3), Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 2)),
    256: (Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2), Tiling(32, 32, 8, 2)),
}
# Exact float32 products run outside the tensor cores and want small tiles.
_FLOAT = {
    64: (Tiling(32, 32, 8, 2),) * 3,
    128: (Tiling(32, 16, 8, 2),) * 3,
    256: (Tiling(16, 16, 8, 2),) * 3,
}
Kernel = Literal["forward", "queries", "keys"]


def tiling(width: int, dtype: torch.dtype, kernel: Kernel) -> Tiling:
    """The tiling of a kernel for heads of `width` channels, padded to a power of two."""
    table = _FLOAT if dtype == torch.float32 else _HALF
    return table[max(width, 64)][get_args(Kernel).index(kernel)]


def head_attention(x: Operands, spans: Tensor | None = None) -> Tensor:
    """Gated attention heads by Triton kernels, forward and backward.

    With `spans` [1, T, 2] a token sees the keys of its span alone, and blocks outside are skipped.

    **Source**: MoH, arXiv 2410.11842, Eq. 4; the online softmax and the recomputed scores are
    FlashAttention's, arXiv 2205.14135 and 2307.08691.
    **Deviates**: rows are gathered by their gates, which changes no number.
    """
    return triton_attention(x.q, x.k, x.v, x.gate, x.causal, spans, x.mask, x.scale)[0]


_ATTENTION = "headwise::triton_attention"
torch.library.define(
    _ATTENTION,
    "(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, Tensor? spans, Tensor? mask, "
    "float scale) -> (Tensor, Tensor)",
)
# y [B, T, H, C], and log2 of the sum of the scores' exponentials [B, H, T] in float32, which is 0
# where a head is off or sees no key.
triton_attention: Any = torch.ops.headwise.triton_attention


@torch.library.impl(_ATTENTION, "default")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, spans: Tensor | None,
    mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, queries, heads, channels = q.shape
    q = adjacent(q)
    y, lse = q.new_empty(q.shape), q.new_empty(batch, heads, queries, dtype=torch.float32)
    positions, on_so_far = ranked(gate)
    mask, mask_strides = expanded(mask, q, k)
    width = triton.next_power_of_2(channels)
    own, step, num_warps, num_stages = tiling(width, q.dtype, "forward")
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(queries, own) * batch * heads,)](
            q, described(k, step, width), described(v, step, width), gate, spans, mask, positions,
            on_so_far, y, lse, q.stride(), gate.stride(), mask_strides, y.stride(),
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
    spans: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and gate."""
    batch, queries, heads, channels = q.shape
    keys, kv_heads = k.shape[1:3]
    dy, q, k, v, y = map(adjacent, (dy, q, k, v, y))
    dq, dk, dv = q.new_zeros(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dgate = gate.new_zeros(gate.shape)
    # By rank; rows beyond the last that is on are read, too, and must add nothing.
    packed_q, packed_dy = (
        q.new_zeros(batch, heads, queries, channels).transpose(1, 2) for _ in range(2)
    )
    packed_lse, packed_delta = torch.empty_like(lse), torch.empty_like(lse)
    positions, on_so_far = ranked(gate)
    mask, mask_strides = expanded(mask, q, k)
    width = triton.next_power_of_2(channels)
    shape = {"C": channels, "WIDTH": width, "CAUSAL": causal, **FUSION}
    sizes = (queries, keys, heads, heads // kv_heads, scale)
    with torch.cuda.device_of(q):
        own, step, num_warps, num_stages = tiling(width, q.dtype, "queries")
        queries_kernel[(triton.cdiv(queries, own) * batch * heads,)](
            q, described(k, step, width), described(v, step, width), gate, spans, mask, positions,
            on_so_far, dy, y, lse, dq, dgate, packed_q, packed_dy, packed_lse, packed_delta,
            q.stride(), gate.stride(), mask_strides, dy.stride(), y.stride(), dq.stride(),
            dgate.stride(), *sizes,
            **shape, ROWS=own, KEYS=step, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        own, step, num_warps, num_stages = tiling(width, q.dtype, "keys")
        keys_kernel[(triton.cdiv(keys, own) * batch * kv_heads,)](
            described(packed_q, step, width), described(packed_dy, step, width), packed_lse,
            packed_delta, k, v, spans, _seeing(spans, keys, own), mask, positions, on_so_far,
            dk, dv, k.stride(), v.stride(), mask_strides, dk.stride(), dv.stride(), *sizes,
            **shape, ROWS=step, KEYS=own, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return dq, dk, dv, dgate


def _seeing(spans: Tensor | None, keys: int, block: int) -> Tensor | None:
    """For each block of keys the first token that sees one of them, and the one after the last.

    Spans ascend with tokens: what begins later ends no earlier.
    """
    if spans is None:
        return None
    begin, end = spans[0].unbind(-1)
    first = torch.arange(0, keys, block, device=spans.device, dtype=spans.dtype)
    edges = (end.contiguous(), first), (begin.contiguous(), first + (block - 1))
    return torch.stack([torch.searchsorted(*edge, right=True) for edge in edges], dim=-1).int()


@torch.library.register_fake(_ATTENTION)
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
    q, k, v, gate, ctx.causal, spans, mask, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate, *output, spans, mask)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *rows, spans, mask = ctx.saved_tensors
    if torch.is_grad_enabled():
        q, k, v, gate = rows[:4]
        x = Operands(q, k, v, gate, ctx.causal, mask, None, ctx.scale)
        return *differentiable_attention_gradients(dy, x, spans)[:4], *[None] * 4
    gradients = triton_attention_backward(dy, *rows, ctx.causal, spans, mask, ctx.scale)
    return *gradients, None, None, None, None


torch.library.register_autograd(_ATTENTION, _backward, setup_context=_save)


register_flop_formula(triton_attention, get_raw=True)(flops_of_what_is_on)


@register_flop_formula(torch.ops.headwise.triton_attention_backward, get_raw=True)
def _backward_flops(dy: Tensor, *args: Any, **_: Any) -> int:
    """Seven products instead of two: both kernels compute the scores and dy · v again."""
    return flops_of_what_is_on(*args[:4], args[6]) * 7 // 2
