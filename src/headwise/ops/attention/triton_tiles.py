"""What the Triton kernels of attention share: checks of queries, keys, the online softmax."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton reads this as well, once: when a kernel is decorated.
INTERPRETED: bool = triton.knobs.runtime.interpret
LOG2E = tl.constexpr(1.4426950408889634)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_queries(q: Tensor) -> None:
    """Refuse what the kernels cannot compute."""
    if q.dtype not in DTYPES:
        raise ValueError(
            f"q has dtype {q.dtype}; impl='triton' takes float32, float16 or bfloat16, "
            "impl='gathered' every float dtype"
        )
    channels = q.shape[-1]
    if channels % 16 or not 32 <= channels <= 256:
        raise ValueError(
            f"q has {channels} channels a head; impl='triton' takes multiples of 16 from 32 to "
            "256, impl='gathered' any number"
        )
    if not (q.is_cuda or INTERPRETED):
        raise ValueError(
            f"q is on {q.device}; impl='triton' needs a CUDA device (or TRITON_INTERPRET=1 before "
            "triton is imported), impl='gathered' runs anywhere"
        )


def described(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """[B, S, H, C] as tiles [1, 1, rows, width] of [B, H, S, C], for the GPU's copy engine.

    Rows beyond S and channels beyond C read as 0. The engine steps in units of 16 bytes, so x is
    copied where its strides or its start are no multiples of that.
    """
    x = x.transpose(1, 2)
    unit = 16 // x.element_size()
    sizes, strides = x.shape[:3], x.stride()[:3]
    steps = [s for n, s in zip(sizes, strides, strict=True) if n > 1]
    if x.stride(3) != 1 or x.data_ptr() % 16 or any(s <= 0 or s % unit for s in steps):
        x = x.contiguous()
        strides = x.stride()[:3]
    # The stride of an axis with one entry is never used; the engine still checks it.
    possible = [s if n > 1 else unit for n, s in zip(sizes, strides, strict=True)]
    return TensorDescriptor(x, list(x.shape), [*possible, 1], [1, 1, rows, width])


def expanded(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask as bytes [B, H, T, S] without a copy, and its strides."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.view(torch.uint8).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return mask, mask.stride()


# no_type_check keeps jaxtyping's import hook from wrapping what Triton must read as source.
@triton.jit
@no_type_check
def visible(keys, first, last, spans, mask, mask_offsets, mask_stride):
    """Where a query may see a key. Shapes broadcast: queries may be the rows, or keys."""
    seen = keys <= last
    if spans is not None:
        seen = seen & (keys >= first)
    if mask is not None:
        allowed = tl.load(mask + mask_offsets + keys.to(tl.int64) * mask_stride, mask=seen, other=0)
        seen = seen & (allowed != 0)
    return seen


@triton.jit
@no_type_check
def longest_first(on_so_far, T, H, ROWS: tl.constexpr):
    """The head [B·H], the first rank and the number of ranks that a program works on.

    Within a batch entry later tokens of all heads come first: they see most keys, and what starts
    last must end soon. Programs without a token that is on come at the end.
    """
    blocks = tl.cdiv(T, ROWS)
    b, turn = tl.program_id(0) // (blocks * H), tl.program_id(0) % (blocks * H)
    pair = (b * H + turn % H).to(tl.int64)
    count = tl.load(on_so_far + pair * T + T - 1)
    block, busy = turn // H, tl.cdiv(count, ROWS)
    block = tl.where(block < busy, busy - 1 - block, block)
    return pair, block * ROWS, count


@triton.jit
@no_type_check
def ranked_tokens(positions, start, count, ROWS: tl.constexpr):
    """The tokens of ranks from start, and which ranks exist: the others repeat the first."""
    ranks = start + tl.arange(0, ROWS)
    valid = ranks < count
    return tl.load(positions + ranks, mask=valid, other=tl.load(positions + start)), valid


@triton.jit
@no_type_check
def first_key(t, spans):
    """The first key that tokens t see."""
    return t * 0 if spans is None else tl.load(spans + 2 * t)


@triton.jit
@no_type_check
def last_key(t, spans, T, S, CAUSAL: tl.constexpr):
    """The last key that tokens t see; without spans the last token sees them all."""
    whole = t + (S - T) if CAUSAL else t * 0 + (S - 1)
    return whole if spans is None else tl.load(spans + 2 * t + 1) - 1


@triton.jit
@no_type_check
def whole_blocks(keys, mask, KEYS: tl.constexpr):
    """How many of the first `keys` keys are in whole blocks, none of whose keys can be hidden."""
    return tl.maximum(keys, 0) // KEYS * KEYS if mask is None else keys * 0


@triton.jit
@no_type_check
def edges(begin, last, spans, mask, KEYS: tl.constexpr):
    """For a block of rows the keys at which it starts to see some, to see all of a block of keys,
    no longer to, and to see none. Blocks of keys start at multiples of KEYS.
    """
    end = tl.max(last, 0) + 1
    whole = whole_blocks(tl.min(last, 0) + 1, mask, KEYS)
    first = end * 0
    inner = first
    if spans is not None:
        first = tl.min(begin, 0) // KEYS * KEYS
        inner = tl.minimum(tl.cdiv(tl.max(begin, 0), KEYS) * KEYS, tl.maximum(end, first))
        whole = tl.maximum(whole, inner)
    return first, inner, whole, end


@triton.jit
@no_type_check
def tile_of(heads, start, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """[KEYS, WIDTH] from row `start`, of a head: (descriptor, b, h)."""
    descriptor, b, h = heads
    return descriptor.load([b, h, start, 0]).reshape(KEYS, WIDTH)


@triton.jit
@no_type_check
def attend(
    sums, peak, total, queries, keys, first, end, scale,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """The online softmax of a block of queries over the keys from first to end.

    Only CHECKED blocks look at the last key of each row and at the mask. `scale` is positive and
    holds log2(e): powers of 2 are what the hardware computes.
    """
    q, first_seen, last, mask_offsets = queries
    k, v, spans, mask, mask_stride = keys
    for start in range(first, end, KEYS):
        k_tile = tile_of(k, start, KEYS, WIDTH)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if CHECKED:
            s = (start + tl.arange(0, KEYS))[None, :]
            seen = visible(
                s, first_seen[:, None], last[:, None], spans, mask, mask_offsets[:, None],
                mask_stride,
            )  # fmt: skip
            scores = tl.where(seen, scores * scale, float("-inf"))
            highest = tl.maximum(peak, tl.max(scores, 1))
            # A row that has seen nothing yet must not compute inf - inf.
            base = tl.where(highest == float("-inf"), 0.0, highest)
            p = tl.exp2(scores - base[:, None])
        else:
            highest = tl.maximum(peak, tl.max(scores, 1) * scale)
            base = highest
            p = tl.exp2(scores * scale - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(p, 1)
        v_tile = tile_of(v, start, KEYS, WIDTH)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * decay[:, None], input_precision="ieee")
        peak = highest
    return sums, peak, total
