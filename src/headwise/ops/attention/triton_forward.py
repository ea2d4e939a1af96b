"""The forward kernel: gathered rows of queries, an online softmax over the keys that they see.

A program computes ROWS consecutive ranks of a head: see `triton_backward` for ranks, by example.
"""

from typing import no_type_check

import triton
import triton.language as tl

from headwise.ops.attention.triton_tiles import (
    LOG2E,
    attend,
    edges,
    first_key,
    last_key,
    longest_first,
)
from headwise.ops.triton_rows import load_tile, store_tile


@triton.jit
@no_type_check
def forward_kernel(
    q, k, v, gate, spans, mask, positions, on_so_far, y, lse,
    q_strides, gate_strides, mask_strides, y_strides,
    T, S, H, GROUP, scale,
    C: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """y, and log2 of the sum of the scores' exponentials, of ROWS tokens of a head; 0 where off."""
    pair, start, count = longest_first(on_so_far, T, H, ROWS)
    b, h = pair // H, pair % H
    y += b * y_strides[0] + h * y_strides[2]
    # All tokens have a rank; those that are off have the last ones. Their y and lse become 0.
    ranks = start + tl.arange(0, ROWS)
    own = tl.load(positions + pair * T + ranks, mask=ranks < T, other=0)
    if start >= count:
        nothing = tl.zeros([ROWS, WIDTH], y.dtype.element_ty)
        store_tile(y, own.to(tl.int64) * y_strides[1], ranks < T, nothing, C, WIDTH)
        tl.store(lse + pair * T + own, 0.0, mask=ranks < T)
        return
    # Gather the rows that are on; ranks beyond `count` repeat the first token.
    valid = ranks < count
    t = tl.where(valid, own, tl.load(positions + pair * T + start))
    rows = t.to(tl.int64)
    begin = first_key(t, spans)
    last = last_key(t, spans, T, S, CAUSAL)
    q += b * q_strides[0] + h * q_strides[2]
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    q_tile = load_tile(q, rows * q_strides[1], valid, C, WIDTH)
    scale *= LOG2E
    queries = (q_tile, begin, last, rows * mask_strides[2])
    head = (b.to(tl.int32), (h // GROUP).to(tl.int32))
    keys = ((k, head[0], head[1]), (v, head[0], head[1]), spans, mask, mask_strides[3])
    # Blocks of keys from `inner` to `whole` are seen by all rows; the others need a check.
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first, inner, whole, end = edges(begin, last, spans, mask, KEYS)
    if spans is not None:
        sums, peak, total = attend(
            sums, peak, total, queries, keys, first, inner, scale, WIDTH, KEYS, True
        )
    sums, peak, total = attend(
        sums, peak, total, queries, keys, inner, whole, scale, WIDTH, KEYS, False
    )
    sums, peak, total = attend(
        sums, peak, total, queries, keys, whole, end, scale, WIDTH, KEYS, True
    )
    # A row that sees no key gives 0.
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    lses = tl.where(blind | (ranks >= count), 0.0, peak + tl.log2(total))
    tl.store(lse + pair * T + own, lses, mask=ranks < T)
    gate += b * gate_strides[0] + h * gate_strides[2]
    gates = tl.load(gate + rows * gate_strides[1], mask=valid, other=0).to(tl.float32)
    tile = tl.where(valid[:, None], sums * (gates / total)[:, None], 0.0).to(y.dtype.element_ty)
    store_tile(y, own.to(tl.int64) * y_strides[1], ranks < T, tile, C, WIDTH)
