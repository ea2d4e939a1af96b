"""What Triton kernels of all ops share: how one is launched, rows that it loads and stores."""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

# Given explicitly, because Triton's default is about to change and Triton warns.
FUSION = {"enable_fp_fusion": True}


class Tiling(NamedTuple):
    """Rows that a program holds, what it reads in one step, and how it is launched."""

    own: int
    step: int
    num_warps: int
    num_stages: int


# no_type_check keeps jaxtyping's import hook from wrapping what Triton must read as source.
@triton.jit
@no_type_check
def load_tile(start, offsets, valid, C: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] at start + offsets: 0 beyond C channels and in rows that are not valid."""
    channels = tl.arange(0, WIDTH)
    inside = valid[:, None] & (channels < C)[None, :]
    return tl.load(start + offsets[:, None] + channels[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_tile(start, offsets, valid, tile, C: tl.constexpr, WIDTH: tl.constexpr):
    channels = tl.arange(0, WIDTH)
    inside = valid[:, None] & (channels < C)[None, :]
    tl.store(start + offsets[:, None] + channels[None, :], tile, mask=inside)
