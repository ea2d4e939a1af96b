"""The backward kernels: `queries_kernel` for dq and dgate, then `keys_kernel` for dk and dv.

Both compute the scores again. For a head with tokens t that are on and keys s, p the softmax of
scale · q·k, o[t] = sum_s p[t,s] v[s] and y = gate · o:

    delta[t] = y[t] · dy[t]                     dgate[t] = o[t] · dy[t] = delta[t] / gate[t]
    dp[t,s]  = gate[t] dy[t] · v[s]             ds[t,s]  = p[t,s] (dp[t,s] − delta[t])
    dq[t]    = scale · sum_s ds[t,s] k[s]       dk[s]    = scale · sum_t ds[t,s] q[t]
                                                dv[s]    = sum_t p[t,s] gate[t] dy[t]

Example: one key, so p = 1; v = 4, gate = 1/2, dy = 3. Then o = 4, y = 2, delta = 6 and dgate = 12.
dp = 6, so ds = 0: a softmax over one key is constant, and q and k have no gradient. dv = 1.5.

A token that is on has a *rank* in its head. Example: of T = 5 tokens 1, 2 and 4 are on. Then

    positions   1 2 4 3 0       the token of each rank, then those that are off
    on_so_far   0 1 2 2 3       how many are on up to and including each token

`queries_kernel` leaves q, gate · dy, the log-sum-exp and delta packed by rank, so that
`keys_kernel` reads them side by side and gathers nothing.
"""

from typing import no_type_check

import triton
import triton.language as tl

from headwise.ops.attention.triton_tiles import (
    LOG2E,
    edges,
    first_key,
    last_key,
    longest_first,
    ranked_tokens,
    tile_of,
    visible,
)
from headwise.ops.triton_rows import load_tile, store_tile


@triton.jit
@no_type_check
def queries_kernel(
    q, k, v, gate, spans, mask, positions, on_so_far, dy, y, lse,
    dq, dgate, packed_q, packed_dy, packed_lse, packed_delta,
    q_strides, gate_strides, mask_strides, dy_strides, y_strides, dq_strides, dgate_strides,
    T, S, H, GROUP, scale,
    C: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq and dgate of ROWS tokens that are on in a head; their rows, packed, for `keys_kernel`."""
    # The head, and the ranks start..start + ROWS of it; ranks from `count` on do not exist.
    pair, start, count = longest_first(on_so_far, T, H, ROWS)
    if start >= count:
        return
    b, h = pair // H, pair % H
    t, valid = ranked_tokens(positions + pair * T, start, count, ROWS)
    rows = t.to(tl.int64)
    begin = first_key(t, spans)
    last = last_key(t, spans, T, S, CAUSAL)
    # Pointers to the head.
    q += b * q_strides[0] + h * q_strides[2]
    dy += b * dy_strides[0] + h * dy_strides[2]
    y += b * y_strides[0] + h * y_strides[2]
    gate += b * gate_strides[0] + h * gate_strides[2]
    if mask is not None:
        mask += b * mask_strides[0] + h * mask_strides[1]
    # Gather the rows: tiles are [ROWS, WIDTH], what belongs to a row is [ROWS].
    q_tile = load_tile(q, rows * q_strides[1], valid, C, WIDTH)
    dy_tile = load_tile(dy, rows * dy_strides[1], valid, C, WIDTH).to(tl.float32)
    y_tile = load_tile(y, rows * y_strides[1], valid, C, WIDTH)
    gates = tl.load(gate + rows * gate_strides[1], mask=valid, other=1).to(tl.float32)
    lses = tl.load(lse + pair * T + t, mask=valid, other=0)
    deltas = tl.sum(y_tile.to(tl.float32) * dy_tile, 1)
    dgate += b * dgate_strides[0] + h * dgate_strides[2]
    dgates = (deltas / gates).to(dgate.dtype.element_ty)
    tl.store(dgate + rows * dgate_strides[1], dgates, mask=valid)
    # From here on dy_tile is gate · dy. Pack the rows for the other kernel.
    dy_tile = (dy_tile * gates[:, None]).to(q_tile.dtype)
    ranks = pair * T + start + tl.arange(0, ROWS)
    store_tile(packed_q, ranks * C, valid, q_tile, C, WIDTH)
    store_tile(packed_dy, ranks * C, valid, dy_tile, C, WIDTH)
    tl.store(packed_lse + ranks, lses, mask=valid)
    tl.store(packed_delta + ranks, deltas, mask=valid)
    # Blocks of keys from `inner` to `whole` are seen by every row of the tile; others need a check.
    queries = (q_tile, dy_tile, lses, deltas, begin, last, rows * mask_strides[2])
    head = (b.to(tl.int32), (h // GROUP).to(tl.int32))
    keys = ((k, head[0], head[1]), (v, head[0], head[1]), spans, mask, mask_strides[3])
    first, inner, whole, end = edges(begin, last, spans, mask, KEYS)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    if spans is not None:
        sums = _add_queries(sums, queries, keys, first, inner, scale, WIDTH, KEYS, True)
    sums = _add_queries(sums, queries, keys, inner, whole, scale, WIDTH, KEYS, False)
    sums = _add_queries(sums, queries, keys, whole, end, scale, WIDTH, KEYS, True)
    dq += b * dq_strides[0] + h * dq_strides[2]
    tile = (sums * scale).to(dq.dtype.element_ty)
    store_tile(dq, rows * dq_strides[1], valid, tile, C, WIDTH)


@triton.jit
@no_type_check
def _add_queries(
    sums, queries, keys, first, end, scale,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """dq / scale of a block of queries, from the keys from first to end."""
    q, dy, lses, deltas, begin, last, mask_offsets = queries
    k, v, spans, mask, mask_stride = keys
    for start in range(first, end, KEYS):
        k_tile = tile_of(k, start, KEYS, WIDTH)
        v_tile = tile_of(v, start, KEYS, WIDTH)
        # scores, p, dp and ds are [ROWS, KEYS].
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2E)
        if CHECKED:
            s = (start + tl.arange(0, KEYS))[None, :]
            seen = visible(
                s, begin[:, None], last[:, None], spans, mask, mask_offsets[:, None], mask_stride
            )
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores - lses[:, None])
        dp = tl.dot(dy, tl.trans(v_tile), input_precision="ieee")
        ds = p * (dp - deltas[:, None])
        sums = tl.dot(ds.to(k_tile.dtype), k_tile, sums, input_precision="ieee")
    return sums


@triton.jit
@no_type_check
def keys_kernel(
    packed_q, packed_dy, packed_lse, packed_delta, k, v, spans, seeing, mask, positions,
    on_so_far, dk, dv,
    k_strides, v_strides, mask_strides, dk_strides, dv_strides,
    T, S, H, GROUP, scale,
    C: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys, over the query heads that share them: 0 where no head is on."""
    # A program is a block of keys of one key head. Earlier keys are seen by more rows, and what
    # takes longest starts first: the first blocks of all heads, then the second ones.
    groups = H // GROUP
    programs = tl.cdiv(S, KEYS) * groups
    b, turn = tl.program_id(0) // programs, tl.program_id(0) % programs
    b, g, start = b.to(tl.int64), (turn % groups).to(tl.int64), turn // groups * KEYS
    s = start + tl.arange(0, KEYS)
    rows = s.to(tl.int64)
    k += b * k_strides[0] + g * k_strides[2]
    v += b * v_strides[0] + g * v_strides[2]
    k_tile = load_tile(k, rows * k_strides[1], s < S, C, WIDTH)
    v_tile = load_tile(v, rows * v_strides[1], s < S, C, WIDTH)
    keys = (k_tile, v_tile, s, spans, mask, mask_strides, T, S)
    k_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    v_sums = tl.zeros([KEYS, WIDTH], tl.float32)
    # The query heads that share these keys add to the same sums, one after the other.
    for i in range(GROUP):
        h = g * GROUP + i
        head = (b * H + h) * T
        count = tl.load(on_so_far + head + T - 1)
        # Ranks ascend with tokens, so those that see the block's first key start at `first`, and
        # those that see all of its keys at `whole`: only ranks between the two need a check.
        first = _rank_seeing(start, on_so_far + head, T, S, CAUSAL)
        whole = _rank_seeing(tl.minimum(start + KEYS, S) - 1, on_so_far + head, T, S, CAUSAL)
        # Blocks are counted from `first`; the one that `whole` falls into needs a check.
        whole = tl.minimum(first + tl.cdiv(whole - first, ROWS) * ROWS, count)
        if mask is not None:
            whole = count
        end = count
        if spans is not None:
            # Of tokens that have spans, `seeing` has the first that sees a key of the block, and
            # the one after the last.
            block = seeing + start // KEYS * 2
            first = _rank_of(tl.load(block), on_so_far + head)
            end = _rank_of(tl.load(block + 1), on_so_far + head)
            whole = end
        place = (b.to(tl.int32), h.to(tl.int32))
        queries = (
            (packed_q, place[0], place[1]), (packed_dy, place[0], place[1]),
            packed_lse + head, packed_delta + head, positions + head,
            b * mask_strides[0] + h * mask_strides[1], count,
        )  # fmt: skip
        k_sums, v_sums = _add_keys(
            k_sums, v_sums, queries, keys, first, whole, scale, WIDTH, CAUSAL, ROWS, True
        )
        k_sums, v_sums = _add_keys(
            k_sums, v_sums, queries, keys, whole, end, scale, WIDTH, CAUSAL, ROWS, False
        )
    dk += b * dk_strides[0] + g * dk_strides[2]
    dv += b * dv_strides[0] + g * dv_strides[2]
    tile = (k_sums * scale).to(dk.dtype.element_ty)
    store_tile(dk, rows * dk_strides[1], s < S, tile, C, WIDTH)
    store_tile(dv, rows * dv_strides[1], s < S, v_sums.to(dv.dtype.element_ty), C, WIDTH)


@triton.jit
@no_type_check
def _rank_seeing(key, on_so_far, T, S, CAUSAL: tl.constexpr):
    """The rank of the first token that is on and sees `key`.

    It is the number of tokens that are on before the first that sees the key. In the example with
    S = T, token 3 is the first to see key 3, and two are on before it: rank 2, which is token 4.
    """
    return _rank_of(key - (S - T), on_so_far) if CAUSAL else key * 0


@triton.jit
@no_type_check
def _rank_of(t, on_so_far):
    """How many of the tokens before t are on."""
    return tl.load(on_so_far + t - 1, mask=t > 0, other=0)


@triton.jit
@no_type_check
def _add_keys(
    k_sums, v_sums, queries, keys, first, end, scale,
    WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of a block of keys, from the rows of ranks first to end of one head.

    A rank beyond `count` reads zeros and adds nothing.
    """
    q, dy, lse, delta, positions, mask_offset, count = queries
    k_tile, v_tile, s, spans, mask, mask_strides, T, S = keys
    for start in range(first, end, ROWS):
        ranks = start + tl.arange(0, ROWS)
        valid = ranks < count
        q_tile = tile_of(q, start, ROWS, WIDTH)
        dy_tile = tile_of(dy, start, ROWS, WIDTH)
        lses = tl.load(lse + ranks, mask=valid, other=0)
        deltas = tl.load(delta + ranks, mask=valid, other=0)
        # Transposed here: scores, p, dp and ds are [KEYS, ROWS].
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * (scale * LOG2E)
        if CHECKED:
            t = tl.load(positions + ranks, mask=valid, other=0)
            begin = first_key(t, spans)[None, :]
            last = last_key(t, spans, T, S, CAUSAL)[None, :]
            offsets = (mask_offset + t.to(tl.int64) * mask_strides[2])[None, :]
            seen = visible(s[:, None], begin, last, spans, mask, offsets, mask_strides[3])
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores - lses[None, :])
        v_sums = tl.dot(p.to(dy_tile.dtype), dy_tile, v_sums, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(dy_tile), input_precision="ieee")
        ds = (p * (dp - deltas[None, :])).to(q_tile.dtype)
        k_sums = tl.dot(ds, q_tile, k_sums, input_precision="ieee")
    return k_sums, v_sums
