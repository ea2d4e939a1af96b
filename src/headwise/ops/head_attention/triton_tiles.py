"""What the Triton kernels share: operands they take, tiles they load, the online softmax."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton decides by this, too, and once: when a kernel is decorated.
INTERPRETED: bool = triton.knobs.runtime.interpret
# Said aloud, because Triton's default is about to change and it warns.
FUSION = {"enable_fp_fusion": True}
LOG2E = tl.constexpr(1.4426950408889634)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_operands(q: Tensor) -> None:
    """Refuse what the kernels cannot compute.

    Raises:
        ValueError: If q's device, dtype or number of channels is not one of the kernels'.
    """
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


def adjacent_channels(*tensors: Tensor) -> list[Tensor]:
    """Every other stride is the kernels' to follow: transposed layouts are not copied."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def expanded(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor | None, tuple[int, ...]]:
    """The mask as bytes [B, H, T, S] without a copy, and its strides."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.view(torch.uint8).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return mask, mask.stride()


# no_type_check keeps jaxtyping's import hook from wrapping what Triton must read as source.
@triton.jit
@no_type_check
def load_tile(start, offsets, valid, C: tl.constexpr, WIDTH: tl.constexpr, CHECKED: tl.constexpr):
    """[rows, WIDTH] at start + offsets: 0 beyond C channels and, if CHECKED, in rows not valid."""
    channels = tl.arange(0, WIDTH)
    pointers = start + offsets[:, None] + channels[None, :]
    if CHECKED:
        inside = valid[:, None] & (channels < C)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif C < WIDTH:
        tile = tl.load(pointers, mask=(channels < C)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
@no_type_check
def store_tile(start, offsets, valid, tile, C: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    inside = valid[:, None] & (channels < C)[None, :]
    tl.store(start + offsets[:, None] + channels[None, :], tile, mask=inside)


@triton.jit
@no_type_check
def visible(keys, last, mask, mask_offsets, mask_stride):
    """Where a query may see a key; shapes broadcast, so either may be the rows."""
    seen = keys <= last
    if mask is not None:
        allowed = tl.load(mask + mask_offsets + keys.to(tl.int64) * mask_stride, mask=seen, other=0)
        seen = seen & (allowed != 0)
    return seen


@triton.jit
@no_type_check
def ranked_tokens(positions, start, count, ROWS: tl.constexpr):
    """The tokens of ranks from start, and which ranks exist: the others repeat the first."""
    ranks = start + tl.arange(0, ROWS)
    valid = ranks < count
    return tl.load(positions + ranks, mask=valid, other=tl.load(positions + start)), valid


@triton.jit
@no_type_check
def last_key(t, T, S, CAUSAL: tl.constexpr):
    """The last key that tokens t see; the last token sees them all."""
    return t + (S - T) if CAUSAL else t * 0 + (S - 1)


@triton.jit
@no_type_check
def whole_blocks(keys, mask, KEYS: tl.constexpr):
    """How many of the first `keys` keys are in blocks of which no key can be hidden."""
    return tl.maximum(keys, 0) // KEYS * KEYS if mask is None else keys * 0


@triton.jit
@no_type_check
def attend(
    sums, peak, total, queries, keys, first, end, scale,
    C: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """The online softmax of a block of queries over the keys from first to end.

    Only CHECKED blocks look at the last key of each row and at the mask. `scale` holds log2(e):
    powers of 2 are what the hardware computes.
    """
    q, last, mask_offsets = queries
    k, v, mask, k_stride, v_stride, mask_stride, S = keys
    for start in range(first, end, KEYS):
        s = start + tl.arange(0, KEYS)
        rows = s.to(tl.int64)
        k_tile = load_tile(k, rows * k_stride, s < S, C, WIDTH, CHECKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale
        if CHECKED:
            seen = visible(s[None, :], last[:, None], mask, mask_offsets[:, None], mask_stride)
            scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet must not compute inf - inf.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_tile(v, rows * v_stride, s < S, C, WIDTH, CHECKED)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * decay[:, None], input_precision="ieee")
        peak = highest
    return sums, peak, total
