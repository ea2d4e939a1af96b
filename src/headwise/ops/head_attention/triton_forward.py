"""The forward kernel: gathered rows of queries, an online softmax over the keys that they see."""

from typing import no_type_check

import triton
import triton.language as tl

from headwise.ops.head_attention.triton_tiles import (
    LOG2E,
    attend,
    last_key,
    load_tile,
    ranked_tokens,
    store_tile,
    whole_blocks,
)


@triton.jit
@no_type_check
def forward_kernel(
    q, k, v, gate, mask, positions, on_so_far, y, lse,
    q_strides, k_strides, v_strides, gate_strides, mask_strides, y_strides,
    T, S, H, GROUP, scale,
    C: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """y, and log2 of the sum of the scores' exponentials, of ROWS tokens that are on in a head."""
    blocks = tl.cdiv(T, ROWS)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    # Later rows see more keys: the longest work starts first.
    start = (blocks - 1 - tl.program_id(0) % blocks) * ROWS
    count = tl.load(on_so_far + pair * T + T - 1)
    if start >= count:
        return
    b, h = pair // H, pair % H
    t, valid = ranked_tokens(positions + pair * T, start, count, ROWS)
    rows = t.to(tl.int64)
    last = last_key(t, T, S, CAUSAL)
    q += b * q_strides[0] + h * q_strides[2]
    k += b * k_strides[0] + h // GROUP * k_strides[2]
    v += b * v_strides[0] + h // GROUP * v_strides[2]
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    q_tile = load_tile(q, rows * q_strides[1], valid, C, WIDTH, True)
    queries = (q_tile, last, rows * mask_strides[2])
    keys = (k, v, mask, k_strides[1], v_strides[1], mask_strides[3], S)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole = whole_blocks(tl.min(last, 0) + 1, mask, KEYS)
    end = tl.max(last, 0) + 1
    sums, peak, total = attend(
        sums, peak, total, queries, keys, 0, whole, scale * LOG2E, C, WIDTH, KEYS, False
    )
    sums, peak, total = attend(
        sums, peak, total, queries, keys, whole, end, scale * LOG2E, C, WIDTH, KEYS, True
    )
    blind = total == 0
    total = tl.where(blind, 1.0, total)
    tl.store(lse + pair * T + t, tl.where(blind, 0.0, peak + tl.log2(total)), mask=valid)
    gate += b * gate_strides[0] + h * gate_strides[2]
    gates = tl.load(gate + rows * gate_strides[1], mask=valid, other=0).to(tl.float32)
    tile = (sums * (gates / total)[:, None]).to(y.dtype.element_ty)
    y += b * y_strides[0] + h * y_strides[2]
    store_tile(y, rows * y_strides[1], valid, tile, C, WIDTH)
