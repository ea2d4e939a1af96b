"""Attention of the heads that are on, gathered: what is off is neither computed nor read.

1. Rows that are on are gathered into tiles (`ragged`).
2. The causal triangle over a tile's rows is cut into rectangles and edges (`pieces`).
3. torch's attention runs on each piece (`plain_attention`).
4. Results of one row over several pieces are merged by their log-sum-exp.

The backward computes the scores again, piece by piece. Where few heads are off, gathering costs
more than it saves, and torch computes all of them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.attention.pieces import Piece
from headwise.ops.attention.ragged import Rows
from headwise.ops.dtypes import wide_dtype
from headwise.ops.gates import attention_flops, share_on
from headwise.ops.plain_attention import (
    OPERANDS,
    Operands,
    attend,
    attend_all,
    attend_all_backward,
    attend_backward,
    before_the_gates,
    differentiable_attention_gradients,
)


def largest_share(dtype: torch.dtype, causal: bool, keys: int) -> float:
    """Share of heads that may be on for gathering to be faster than computing all of them.

    Measured (results/performance.csv): gathering costs a nearly constant time per row, splitting a
    triangle costs more, and torch's own kernel is fastest in half precision.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    at_1024, per_doubling = {
        (False, False): (0.83, 0.1),
        (False, True): (0.57, 0.1),
        (True, False): (0.70, 0.25),
        (True, True): (0.38, 0.1),
    }[half, causal]
    return min(0.95, at_1024 + per_doubling * math.log2(max(keys, 1) / 1024))


def head_attention(x: Operands) -> Tensor:
    return gathered_attention(*x)[0]


@torch.library.custom_op(
    "headwise::gathered_attention", mutates_args=(), schema=f"({OPERANDS}) -> (Tensor, Tensor)"
)
def gathered_attention(*operands: Any) -> tuple[Tensor, Tensor]:
    """y [B, T, H, C], and the log-sum-exp of the scores [B, T, H], 0 where a head is off."""
    x = Operands(*operands)
    q, k, v = x[:3]
    limit = largest_share(q.dtype, x.causal, k.shape[1])
    if share_on(x.gate) >= limit:
        return attend_all(x)
    rows = Rows(x, largest_share=limit)
    wide = wide_dtype(q)
    q_rows, out, lse = rows.gather(q), rows.empty(q), rows.empty(q[..., 0], wide)
    for tile in rows.tiles:
        tile_q, tile_out, tile_lse = map(tile.of, (q_rows, out, lse))
        pieces = rows.pieces(tile)
        # Sums of several pieces are kept in float32 or wider.
        merged = tile_out if len(pieces) == 1 else torch.empty_like(tile_out, dtype=wide)
        merged = tile_out if tile_out.dtype == wide else merged
        for piece in pieces:
            part, part_lse = attend(
                tile_q[:, :, piece.rows],
                tile.keys(k)[:, :, piece.keys],
                tile.keys(v)[:, :, piece.keys],
                added=rows.added(tile, piece, q.dtype),
                causal=piece.kind == "square",
                scale=x.scale,
                blind=x.mask is not None,
            )
            _merge(merged[:, :, piece.rows], tile_lse[:, :, piece.rows], part, part_lse, piece)
        if merged is not tile_out:
            tile_out.copy_(merged)
    out[:-1] *= rows.gather(x.gate.to(q.dtype)).unsqueeze(-1)
    return rows.scatter(out), rows.scatter(lse)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, piece: Piece) -> None:
    """out and lse of rows over more keys, in place: averages weighted by exp(lse)."""
    if piece.kind != "rectangle":
        out.copy_(part)
        lse.copy_(part_lse)
        return
    weight = torch.sigmoid(part_lse - lse)
    out.lerp_(part.to(out.dtype), weight.unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)


@torch.library.custom_op(
    "headwise::gathered_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {OPERANDS}, Tensor y, Tensor lse, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gathered_attention_backward(
    dy: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gate and bias (empty unless `needs_bias`)."""
    *operands, y, lse, needs_bias = args
    x = Operands(*operands)
    q, k, v, gate, causal, _, bias, scale = x
    limit = largest_share(q.dtype, causal, k.shape[1])
    if share_on(gate) >= limit:
        return attend_all_backward(dy, x, y, lse, needs_bias)
    rows = Rows(x, largest_share=limit)
    wide = wide_dtype(q)
    # Rows that only fill up a tile have gate 0 here: nothing flows back through them.
    gates = rows.gather_once(gate.to(wide))
    dgate = rows.empty(gate)
    dout, out, dgate[:-1] = before_the_gates(rows.gather(dy), rows.gather(y), gates)
    # Such a row has the log-sum-exp of another one, with which its exponentials may overflow. A
    # log-sum-exp of inf makes them 0.
    q_rows, lse = rows.gather(q), rows.gather_once(lse, math.inf)
    dq = rows.empty(q, wide).zero_()
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    dbias = q.new_zeros(bias.shape if needs_bias and bias is not None else 0, dtype=wide)
    for tile in rows.tiles:
        of_tile = map(tile.of, (q_rows, dq, dout, out, lse))
        tile_q, tile_dq, tile_dout, tile_out, tile_lse = of_tile
        for piece in rows.pieces(tile):
            part = attend_backward(
                *(x[:, :, piece.rows] for x in (tile_dout, tile_q)),
                *(tile.keys(x)[:, :, piece.keys] for x in (k, v)),
                *(x[:, :, piece.rows] for x in (tile_out, tile_lse)),
                added=rows.added(tile, piece, q.dtype),
                causal=piece.kind == "square",
                scale=scale,
                scores_gradient=needs_bias,
            )
            tile_dq[:, :, piece.rows] += part.q
            tile.keys(dk)[:, :, piece.keys] += part.k
            tile.keys(dv)[:, :, piece.keys] += part.v
            if part.scores is not None:
                rows.add_to_bias(dbias, tile, piece, part.scores)
    dq, dk, dv = rows.scatter(dq).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    return dq, dk, dv, rows.scatter(dgate), dbias


@gathered_attention.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(q)
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide)


@gathered_attention_backward.register_fake
def _(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, _, lse, needs_bias = args
    x = Operands(*operands)
    bias_shape = x.bias.shape if needs_bias and x.bias is not None else (0,)
    dbias = lse.new_empty(bias_shape) if needs_bias else dy.new_empty(0)
    return *(like.new_empty(like.shape) for like in x[:4]), dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, gate, ctx.causal, mask, bias, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, gate, mask, bias, *output)


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, gate, mask, bias, y, lse = ctx.saved_tensors
    if torch.is_grad_enabled():
        x = Operands(q, k, v, gate, ctx.causal, mask, bias, ctx.scale)
        *gradients, dbias = differentiable_attention_gradients(dy, x)
        return *gradients, None, None, dbias, None
    needs_bias = ctx.needs_input_grad[6]
    *gradients, dbias = gathered_attention_backward(
        dy, q, k, v, gate, ctx.causal, mask, bias, ctx.scale, y, lse, needs_bias
    )
    return *gradients, None, None, dbias.to(bias.dtype) if needs_bias else None, None


gathered_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.gathered_attention, get_raw=True)
def _flops(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, *_: Any, **__: Any) -> int:
    computed = gate != 0
    if share_on(gate) >= largest_share(q.dtype, causal, k.shape[1]):
        computed = torch.ones_like(computed)
    return attention_flops(q, k, computed, causal)


@register_flop_formula(torch.ops.headwise.gathered_attention_backward, get_raw=True)
def _backward_flops(dy: Tensor, *args: Any, **options: Any) -> int:
    return _flops(*args) * 5 // 2
