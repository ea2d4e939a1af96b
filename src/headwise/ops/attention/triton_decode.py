"""Decoding in Triton: one or a few queries, the keys split among programs (flash decoding).

A program holds all query heads that share a head of keys; where none of them is on, it leaves
before it has read a key.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.attention.triton_tiles import (
    LOG2E,
    attend,
    described,
    expanded,
    first_key,
    last_key,
    whole_blocks,
)
from headwise.ops.gates import flops_of_what_is_on
from headwise.ops.plain_attention import Operands
from headwise.ops.tensors import adjacent
from headwise.ops.triton_rows import FUSION, load_tile

# Programs that fill a GPU: a constant, so that the order of sums does not depend on the device.
# They and the block of keys were swept on an H100 (benchmarks/gpu/tiles.py).
PROGRAMS = 512
MAX_SPLITS = 64


def block_of_keys(width: int, dtype: torch.dtype) -> int:
    """Keys that a program reads in one step, for heads of `width` channels."""
    if dtype == torch.float32:
        return 32 if width <= 64 else 16
    return 64 if width <= 128 else 32


def decode_attention(x: Operands, spans: Tensor | None = None) -> Tensor:
    """Gated attention heads for one or a few queries and many keys; forward only.

    With `spans` [1, T, 2] a token sees the keys of its span alone; others are not read.

    **Source**: MoH, arXiv 2410.11842, Eq. 4; splitting the keys is Flash-Decoding's (Dao et al.
    2023).
    **Deviates**: a group of query heads that are all off reads neither keys nor values.
    """
    return triton_decode(x.q, x.k, x.v, x.gate, x.causal, spans, x.mask, x.scale)


_DECODE = "headwise::triton_decode"
torch.library.define(
    _DECODE,
    "(Tensor q, Tensor k, Tensor v, Tensor gate, bool causal, Tensor? spans, Tensor? mask, "
    "float scale) -> Tensor",
)
triton_decode: Any = torch.ops.headwise.triton_decode


@torch.library.impl(_DECODE, "default")
def _decode(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, causal: bool, spans: Tensor | None,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    batch, queries, heads, channels = q.shape
    keys, kv_heads = k.shape[1:3]
    q = adjacent(q)
    width = triton.next_power_of_2(channels)
    block, group = block_of_keys(width, q.dtype), heads // kv_heads
    splits, keys_each = _splits(keys, batch * kv_heads, block)
    # The entries of heads that are off are neither written nor read.
    totals = q.new_empty(2, batch, heads, queries, splits, dtype=torch.float32)
    sums = q.new_empty(batch, heads, queries, splits, channels, dtype=torch.float32)
    y = q.new_empty(q.shape)
    mask, mask_strides = expanded(mask, q, k)
    with torch.cuda.device_of(q):
        _split_kernel[(batch * kv_heads, splits)](
            q, described(k, block, width), described(v, block, width), gate, spans, mask,
            *totals, sums, q.stride(), gate.stride(), mask_strides,
            queries, keys, heads, keys_each, scale,
            C=channels, WIDTH=width, CAUSAL=causal, GROUP=group,
            ROWS=max(16, triton.next_power_of_2(queries * group)), KEYS=block,
            num_warps=4, num_stages=3, **FUSION,
        )  # fmt: skip
        _merge_kernel[(batch * heads * queries,)](
            gate, *totals, sums, y, gate.stride(), y.stride(), queries, heads, splits,
            C=channels, WIDTH=width, SPLITS=triton.next_power_of_2(splits),
            num_warps=4, **FUSION,
        )  # fmt: skip
    return y


@torch.library.register_fake(_DECODE)
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


# A tile also computes the other query heads of a key head, and wastes that: it is not counted.
register_flop_formula(triton_decode, get_raw=True)(flops_of_what_is_on)


def _splits(keys: int, groups: int, block: int) -> tuple[int, int]:
    """How many programs share the keys, and keys of each: whole blocks, no program without any."""
    wanted = min(triton.cdiv(PROGRAMS, max(groups, 1)), MAX_SPLITS)
    keys_each = max(triton.cdiv(triton.cdiv(keys, wanted), block), 1) * block
    return max(triton.cdiv(keys, keys_each), 1), keys_each


@triton.jit
@no_type_check
def _split_kernel(
    q, k, v, gate, spans, mask, peaks, totals, sums,
    q_strides, gate_strides, mask_strides,
    T, S, H, keys_each, scale,
    C: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The online softmax of all query heads of a group over one share of its keys."""
    group = tl.program_id(0).to(tl.int64)
    b, g = group // (H // GROUP), group % (H // GROUP)
    row = tl.arange(0, ROWS)
    t, h = row // GROUP, g * GROUP + row % GROUP
    rows = t.to(tl.int64)
    gate += b * gate_strides[0]
    gates = tl.load(gate + rows * gate_strides[1] + h * gate_strides[2], mask=t < T, other=0)
    on = gates != 0
    if tl.max(on.to(tl.int32), 0) == 0:
        return
    q += b * q_strides[0]
    if mask is not None:
        mask += b * mask_strides[0]
    # Rows beyond the last token have its span, and are not on.
    token = tl.minimum(t, T - 1)
    begin = first_key(token, spans)
    last = tl.where(t < T, last_key(token, spans, T, S, CAUSAL), S - 1)
    q_tile = load_tile(q, rows * q_strides[1] + h * q_strides[2], on, C, WIDTH)
    # Of a mask only rows that are on exist; the others look at the first key's.
    mask_offsets = tl.where(on, rows * mask_strides[2] + h * mask_strides[1], 0)
    scale *= LOG2E
    queries = (q_tile, begin, last, mask_offsets)
    head = (b.to(tl.int32), g.to(tl.int32))
    keys = ((k, head[0], head[1]), (v, head[0], head[1]), spans, mask, mask_strides[3])
    first = tl.program_id(1) * keys_each
    end = tl.minimum(first + keys_each, S)
    whole = whole_blocks(tl.minimum(tl.min(last, 0) + 1, end), mask, KEYS)
    if spans is not None:
        first = tl.maximum(first, tl.min(tl.where(on, begin, S), 0) // KEYS * KEYS)
        whole = first
    whole = tl.maximum(whole, first)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sum_ = tl.zeros([ROWS, WIDTH], tl.float32)
    sum_, peak, total = attend(
        sum_, peak, total, queries, keys, first, whole, scale, WIDTH, KEYS, False
    )
    sum_, peak, total = attend(
        sum_, peak, total, queries, keys, whole, end, scale, WIDTH, KEYS, True
    )
    place = ((b * H + h) * T + t) * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks + place, peak, mask=on)
    tl.store(totals + place, total, mask=on)
    channels = tl.arange(0, WIDTH)
    inside = on[:, None] & (channels < C)[None, :]
    tl.store(sums + (place * C)[:, None] + channels[None, :], sum_, mask=inside)


@triton.jit
@no_type_check
def _merge_kernel(
    gate, peaks, totals, sums, y, gate_strides, y_strides, T, H, splits,
    C: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """y of one token and head from the shares of its keys: averages weighted by their totals."""
    row = tl.program_id(0).to(tl.int64)
    b, h, t = row // T // H, row // T % H, row % T
    weight = tl.load(gate + b * gate_strides[0] + t * gate_strides[1] + h * gate_strides[2])
    channels = tl.arange(0, WIDTH)
    out = tl.zeros([WIDTH], tl.float32)
    if weight != 0:
        split = tl.arange(0, SPLITS)
        there = split < splits
        place = row * splits + split
        peak = tl.load(peaks + place, mask=there, other=float("-inf"))
        highest = tl.max(peak, 0)
        shares = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
        total = tl.sum(shares * tl.load(totals + place, mask=there, other=0.0), 0)
        tile = load_tile(sums, place * C, there, C, WIDTH)
        out = tl.sum(shares[:, None] * tile, 0)
        out *= weight.to(tl.float32) / tl.where(total == 0, 1.0, total)
    y += b * y_strides[0] + t * y_strides[1] + h * y_strides[2]
    tl.store(y + channels, out.to(y.dtype.element_ty), mask=channels < C)
