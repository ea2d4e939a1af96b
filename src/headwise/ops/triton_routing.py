"""Routing in one Triton kernel a call, for GPUs: no gradients.

A token's scores are a few numbers. A chain of tensor operations would launch dozens of kernels for
them, and a GPU that waits for Python gains nothing from heads that it skips.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from headwise.ops.tensors import adjacent
from headwise.ops.triton_rows import FUSION

# Numbers that a program holds at a time.
_NUMBERS, _WARPS = 2048, 4
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


def query_norm_routing(
    q: Tensor, shared: list[int], top_k: int, scale_by_std: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `ops.route_heads_by_query_norm`'s routing, in order; q is [B, T, H, C]."""
    batch, tokens, heads, channels = q.shape
    q, routed = adjacent(q), heads - len(shared)
    gates = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    indices = q.new_empty(batch, tokens, top_k, dtype=torch.long)
    probabilities, logits = (gates.new_empty(batch, tokens, routed) for _ in range(2))
    rows, width = triton.next_power_of_2(heads), triton.next_power_of_2(channels)
    at_once = max(1, _NUMBERS // (rows * width))
    with torch.cuda.device_of(q):
        _query_norm_kernel[(triton.cdiv(batch * tokens, at_once),)](
            q, gates, indices, probabilities, logits, q.stride(),
            batch * tokens, tokens, heads, routed, sum(1 << head for head in shared),
            K=top_k, KEPT=triton.next_power_of_2(max(1, top_k)), SCALED=scale_by_std and routed > 1,
            C=channels, WIDTH=width, HEADS=rows, TOKENS=at_once, num_warps=_WARPS, **FUSION,
        )  # fmt: skip
    return gates, indices, probabilities, logits


def two_stage_routing(
    shared: Tensor, routed: Tensor, stage: Tensor | None, top_k: int, paper: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The first fields of `ops.route_heads`'s routing, in order, of logits [..., n]."""
    batch, num_shared, num_routed = shared.shape[:-1], shared.shape[-1], routed.shape[-1]
    tokens = batch.numel()
    rows = [adjacent(x.reshape(tokens, x.shape[-1])) for x in (shared, routed)]
    rows.append(rows[0] if stage is None else adjacent(stage.reshape(tokens, 2)))
    gates = routed.new_empty(*batch, num_shared + num_routed)
    indices = routed.new_empty(*batch, top_k, dtype=torch.long)
    probabilities = routed.new_empty(*batch, num_routed)
    widths = [triton.next_power_of_2(max(1, n)) for n in (num_shared, num_routed)]
    at_once = max(1, _NUMBERS // max(widths))
    with torch.cuda.device_of(routed):
        _two_stage_kernel[(triton.cdiv(tokens, at_once),)](
            *rows, gates, indices, probabilities, *(x.stride(0) for x in rows), tokens,
            SHARED=num_shared, ROUTED=num_routed, K=top_k,
            KEPT=triton.next_power_of_2(max(1, top_k)), PAPER=paper,
            SHARED_WIDTH=widths[0], ROUTED_WIDTH=widths[1], TOKENS=at_once,
            num_warps=_WARPS, **FUSION,
        )  # fmt: skip
    return gates, indices, probabilities


def token_routing(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The first fields of `ops.route_tokens`'s routing, in order, of logits [..., E]."""
    batch, experts = logits.shape[:-1], logits.shape[-1]
    tokens = batch.numel()
    rows = adjacent(logits.reshape(tokens, experts))
    weights, probabilities = logits.new_empty(*batch, top_k), logits.new_empty(logits.shape)
    indices = logits.new_empty(*batch, top_k, dtype=torch.long)
    width = triton.next_power_of_2(experts)
    at_once = max(1, _NUMBERS // width)
    with torch.cuda.device_of(logits):
        _token_kernel[(triton.cdiv(tokens, at_once),)](
            rows, weights, indices, probabilities, rows.stride(0), tokens, experts,
            K=top_k, KEPT=triton.next_power_of_2(top_k), NORMALIZED=normalize,
            WIDTH=width, TOKENS=at_once, num_warps=_WARPS, **FUSION,
        )  # fmt: skip
    return weights, indices, probabilities


@triton.jit
@no_type_check
def _query_norm_kernel(
    q, gates, indices, probabilities, logits, q_strides, N, T, H, R, shared_heads,
    K: tl.constexpr, KEPT: tl.constexpr, SCALED: tl.constexpr, C: tl.constexpr,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """All of TOKENS tokens. `shared_heads` has a bit for each; routed ones are counted by rank."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    h, channels = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    is_routed = (h < H) & ((shared_heads >> h.to(tl.int64)) & 1 == 0)
    rank = tl.cumsum(is_routed.to(tl.int32), 0) - 1
    there = (n < N)[:, None] & is_routed[None, :]
    rows = (n // T * q_strides[0] + n % T * q_strides[1])[:, None] + (h * q_strides[2])[None, :]
    tile = tl.load(
        q + rows[:, :, None] + channels[None, None, :],
        mask=there[:, :, None] & (channels < C)[None, None, :], other=0,
    ).to(tl.float32)  # fmt: skip
    norms = tl.sqrt(tl.sum(tile * tile, 2))
    scaled = norms
    if SCALED:
        far = tl.where(is_routed[None, :], norms - (tl.sum(norms, 1) / R)[:, None], 0.0)
        std = tl.sqrt(tl.sum(far * far, 1) / (R - 1))
        # Nothing but rounding is no deviation.
        std = tl.where(std > tl.max(norms, 1) * (4 * _EPS), std, 1.0)
        scaled = norms / std[:, None]
    places = (n * R)[:, None] + rank[None, :]
    tl.store(logits + places, scaled, mask=there)
    tl.store(probabilities + places, _softmax(scaled, is_routed[None, :]), mask=there)
    chosen, _, on = _best(tl.where(is_routed[None, :], norms, -1.0), rank, H, K, KEPT)
    _store_kept(indices, n, N, chosen, K, KEPT)
    on = on | (is_routed == 0)[None, :]
    places = (n * H)[:, None] + h[None, :]
    tl.store(gates + places, on.to(tl.float32), mask=(n < N)[:, None] & (h < H)[None, :])


@triton.jit
@no_type_check
def _two_stage_kernel(
    shared, routed, stage, gates, indices, probabilities, shared_stride, routed_stride,
    stage_stride, N,
    SHARED: tl.constexpr, ROUTED: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr,
    PAPER: tl.constexpr, SHARED_WIDTH: tl.constexpr, ROUTED_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """All of TOKENS tokens: the formulas of `ops.route_heads`."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = n < N
    of_shared = tl.full([TOKENS], 1.0 if PAPER else SHARED, tl.float32)
    of_routed = tl.full([TOKENS], 1.0 if PAPER else K, tl.float32)
    if SHARED > 0 and ROUTED > 0:
        first = tl.load(stage + n * stage_stride, mask=inside, other=0)
        second = tl.load(stage + n * stage_stride + 1, mask=inside, other=0)
        highest = tl.maximum(first, second)
        first, second = tl.exp(first - highest), tl.exp(second - highest)
        scale = (1.0 if PAPER else 2.0) / (first + second)
        of_shared, of_routed = of_shared * first * scale, of_routed * second * scale
    if SHARED > 0:
        h = tl.arange(0, SHARED_WIDTH)
        there = inside[:, None] & (h < SHARED)[None, :]
        z = tl.load(shared + (n * shared_stride)[:, None] + h[None, :], mask=there, other=0)
        s = _softmax(z, (h < SHARED)[None, :]) * of_shared[:, None]
        tl.store(gates + (n * (SHARED + ROUTED))[:, None] + h[None, :], s, mask=there)
    if ROUTED > 0:
        h = tl.arange(0, ROUTED_WIDTH)
        there = inside[:, None] & (h < ROUTED)[None, :]
        z = tl.load(routed + (n * routed_stride)[:, None] + h[None, :], mask=there, other=0)
        p = _softmax(z, (h < ROUTED)[None, :])
        tl.store(probabilities + (n * ROUTED)[:, None] + h[None, :], p, mask=there)
        chosen, _, on = _best(tl.where((h < ROUTED)[None, :], p, -1.0), h, ROUTED, K, KEPT)
        _store_kept(indices, n, N, chosen, K, KEPT)
        kept = tl.where(on, p, 0.0)
        if not PAPER:
            of_routed = of_routed / tl.maximum(tl.sum(kept, 1), _EPS)
        kept *= of_routed[:, None]
        tl.store(gates + (n * (SHARED + ROUTED) + SHARED)[:, None] + h[None, :], kept, mask=there)


@triton.jit
@no_type_check
def _token_kernel(
    logits, weights, indices, probabilities, stride, N, E,
    K: tl.constexpr, KEPT: tl.constexpr, NORMALIZED: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """All of TOKENS tokens: the formulas of `ops.route_tokens`, with softmax."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, WIDTH)
    there = (n < N)[:, None] & (e < E)[None, :]
    z = tl.load(logits + (n * stride)[:, None] + e[None, :], mask=there, other=0)
    p = _softmax(z, (e < E)[None, :])
    tl.store(probabilities + (n * E)[:, None] + e[None, :], p, mask=there)
    chosen, kept, _ = _best(tl.where((e < E)[None, :], p, -1.0), e, E, K, KEPT)
    if NORMALIZED:
        kept = kept / tl.sum(kept, 1)[:, None]
    _store_kept(indices, n, N, chosen, K, KEPT)
    _store_kept(weights, n, N, kept, K, KEPT)


@triton.jit
@no_type_check
def _softmax(z, there):
    """Over the last axis, of what is there."""
    z = tl.where(there, z, float("-inf"))
    powers = tl.exp(z - tl.max(z, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
@no_type_check
def _best(scores, labels, count, K: tl.constexpr, KEPT: tl.constexpr):
    """Labels and scores of the K largest of each row, best first, [TOKENS, KEPT]; and where.

    Of equal ones the first wins. Scores are above -1, of those that do not count -1. Only the first
    `count` are chosen, even where some are not numbers.
    """
    columns, places = tl.arange(0, scores.shape[1])[None, :], tl.arange(0, KEPT)[None, :]
    chosen = tl.zeros([scores.shape[0], KEPT], tl.int32)
    kept = tl.zeros([scores.shape[0], KEPT], tl.float32)
    on = scores < -2.0
    for k in range(K):
        here = columns == tl.minimum(tl.argmax(scores, 1), count - 1)[:, None]
        label = tl.sum(tl.where(here, labels[None, :], 0), 1)
        chosen = tl.where(places == k, label[:, None], chosen)
        kept = tl.where(places == k, tl.max(scores, 1)[:, None], kept)
        on = on | here
        scores = tl.where(here, -1.0, scores)
    return chosen, kept, on


@triton.jit
@no_type_check
def _store_kept(where, n, N, values, K: tl.constexpr, KEPT: tl.constexpr):
    """The first K of KEPT values of each token, [N, K]."""
    k = tl.arange(0, KEPT)
    inside = (n < N)[:, None] & (k < K)[None, :]
    tl.store(where + (n * K)[:, None] + k[None, :], values, mask=inside)
