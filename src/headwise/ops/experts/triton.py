"""Experts in Triton: the forward in one kernel, the backward by torch's grouped products.

A program of the forward gathers consecutive rows of one expert and walks over the hidden units some
at a time, as attention walks over keys, so that hidden activations [N·K, F] never leave the chip.
The backward computes them again and keeps them meanwhile, with their gradients.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from headwise.ops.experts.choices import runs_of_experts
from headwise.ops.experts.grouped import backward_flops, forward_flops, register_backward
from headwise.ops.tensors import adjacent
from headwise.ops.triton_rows import FUSION, Tiling, load_tile, store_tile

# What the tensor cores take.
_SMALLEST_PRODUCT = 16


def tiling(width: int) -> Tiling:
    """Rows and hidden units at a time, for rows of `width` channels, padded to a power of two.

    The fastest on an H100 for 96 experts of 512 hidden units (benchmarks/gpu/tiles.py).
    """
    return Tiling(128, 32, 8, 3) if width > 128 else Tiling(64, 64, 4, 2)


@torch.library.custom_op("headwise::triton_experts", mutates_args=())
def expert_mlp(
    x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, activation: str
) -> Tensor:
    """y [N, D] of `ops.expert_mlp` for narrow rows in float16 or bfloat16.

    Hidden activations are rounded as the second product reads them; what the experts say is
    weighed in float32.
    """
    (num_experts, channels, hidden), top_k = down.shape, indices.shape[1]
    order, ends = runs_of_experts(indices, num_experts)
    x, weights = adjacent(x), weights.flatten()
    y = x.new_empty(len(order), channels)
    width = max(_SMALLEST_PRODUCT, triton.next_power_of_2(channels))
    rows, step, num_warps, num_stages = tiling(width)
    # The last tile of each run may be part full. What goes nowhere is a run, too.
    most_tiles = triton.cdiv(len(order), rows) + num_experts + 1
    with torch.cuda.device_of(x):
        _experts_kernel[(most_tiles,)](
            x, weights, order, ends,
            _described(up, [1, step, width]), _described(down, [1, width, step]), y,
            x.stride(0), num_experts, top_k, hidden,
            C=channels, WIDTH=width, ROWS=rows, STEP=step, GATED=up.shape[1] != hidden,
            RUNS=triton.next_power_of_2(num_experts + 1), ACTIVATION=activation,
            num_warps=num_warps, num_stages=num_stages, **FUSION,
        )  # fmt: skip
    return y.unflatten(0, (-1, top_k)).sum(1)


def _described(x: Tensor, tile: list[int]) -> TensorDescriptor:
    """Matrices in tiles for the GPU's copy engine, which starts at multiples of 16 bytes only."""
    x = x.contiguous()
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile)


@triton.jit
@no_type_check
def _experts_kernel(
    x, weights, order, ends, up, down, y, x_stride, E, K, HIDDEN,
    C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
    GATED: tl.constexpr, RUNS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y [N·K, C] of ROWS choices of one expert, each in the place where the choice stood.

    By example: runs that end at 5, 5 and 9 with tiles of 4 rows are 2, 0 and 1 tiles; program 2 is
    the first tile of run 2, rows 5 to 8.
    """
    runs = tl.arange(0, RUNS)
    last = tl.load(ends + runs, mask=runs <= E, other=0)
    first = tl.load(ends + runs - 1, mask=(runs >= 1) & (runs <= E), other=0)
    tiles = tl.where(runs <= E, tl.cdiv(last - first, ROWS), 0)
    through = tl.cumsum(tiles, 0)
    program = tl.program_id(0)
    own = tl.sum((through <= program).to(tl.int32), 0)
    if own > E:
        return
    before = tl.sum(tl.where(runs == own, through - tiles, 0), 0)
    start = tl.sum(tl.where(runs == own, first, 0), 0) + (program - before) * ROWS
    ranks = start + tl.arange(0, ROWS)
    valid = ranks < tl.sum(tl.where(runs == own, last, 0), 0)
    places = tl.load(order + ranks, mask=valid, other=0)
    if own == E:
        store_tile(y, places * C, valid, tl.zeros([ROWS, WIDTH], y.dtype.element_ty), C, WIDTH)
        return
    rows = load_tile(x, places // K * x_stride, valid, C, WIDTH)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for unit in range(0, HIDDEN, STEP):
        raised = _product(rows, up.load([own, unit, 0]).reshape(STEP, WIDTH))
        inner = _activated(raised, ACTIVATION)
        if GATED:
            inner *= _product(rows, up.load([own, HIDDEN + unit, 0]).reshape(STEP, WIDTH))
        # Beyond HIDDEN the tiles of a gate reach into the values' rows.
        inner = tl.where((unit + tl.arange(0, STEP) < HIDDEN)[None, :], inner, 0.0)
        tile = down.load([own, 0, unit]).reshape(WIDTH, STEP)
        sums = tl.dot(inner.to(tile.dtype), tl.trans(tile), sums, input_precision="ieee")
    weight = tl.load(weights + places, mask=valid, other=0).to(tl.float32)
    store_tile(y, places * C, valid, (sums * weight[:, None]).to(y.dtype.element_ty), C, WIDTH)


@triton.jit
@no_type_check
def _product(rows, weight):
    """rows · weightᵀ in float32."""
    return tl.dot(rows, tl.trans(weight), input_precision="ieee")


@triton.jit
@no_type_check
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@torch.library.custom_op("headwise::triton_experts_backward", mutates_args=())
def expert_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, up and down: torch's grouped products, one kernel between them.

    The hidden activations are computed again. With w the weight of a choice, for each expert

        h = act(W_up x),   dh = W_downᵀ dy,   dw = dh·h,   dW_down = dy (w h)ᵀ
        dr = w dh act',    dW_up = dr xᵀ,     dx = W_upᵀ dr
    """
    (num_experts, _, hidden), top_k = down.shape, indices.shape[1]
    runs = runs_of_experts(indices, num_experts)
    order, ends, total = runs.order, runs.ends[:-1], len(runs.order)
    rows, dout = (tensor[order // top_k] for tensor in (x, dy))
    raised, dinner = grouped_mm(rows, up.mT, offs=ends), grouped_mm(dout, down, offs=ends)
    draised, weighed = torch.empty_like(raised), torch.empty_like(dinner)
    dweights = weights.new_zeros(total)
    with torch.cuda.device_of(x):
        _inner_backward_kernel[(total,)](
            raised, dinner, weights.flatten(), order, ends, draised, weighed, dweights, num_experts,
            HIDDEN=hidden, WIDTH=triton.next_power_of_2(hidden), GATED=up.shape[1] != hidden,
            ACTIVATION=activation, num_warps=4, **FUSION,
        )  # fmt: skip
    dup = grouped_mm(draised.T, rows, offs=ends)
    ddown = grouped_mm(dout.T, weighed, offs=ends)
    # torch's kernel leaves the rows of what goes nowhere as they were.
    drows = torch.where(runs.go_somewhere(), grouped_mm(draised, up, offs=ends), 0)
    dx = runs.put_back(drows).unflatten(0, (-1, top_k)).sum(1)
    return dx, dweights.view(weights.shape), dup, ddown


@triton.jit
@no_type_check
def _inner_backward_kernel(
    raised, dinner, weights, order, ends, draised, weighed, dweights, E,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Of one choice, in float32: w dh act', w h and dw = dh·h from W_up x and dh."""
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(ends + E - 1):
        return
    place = tl.load(order + row)
    weight = tl.load(weights + place).to(tl.float32)
    unit = tl.arange(0, WIDTH)
    inside = unit < HIDDEN
    raised += row * (2 * HIDDEN if GATED else HIDDEN)
    draised += row * (2 * HIDDEN if GATED else HIDDEN)
    gate = tl.load(raised + unit, mask=inside, other=0).to(tl.float32)
    dh = tl.load(dinner + row * HIDDEN + unit, mask=inside, other=0).to(tl.float32)
    inner, slope = _activated(gate, ACTIVATION), _slope(gate, ACTIVATION)
    if GATED:
        value = tl.load(raised + HIDDEN + unit, mask=inside, other=0).to(tl.float32)
        dvalue = (weight * dh * inner).to(draised.dtype.element_ty)
        tl.store(draised + HIDDEN + unit, dvalue, mask=inside)
        inner, slope = inner * value, slope * value
    tl.store(draised + unit, (weight * dh * slope).to(draised.dtype.element_ty), mask=inside)
    kept = (weight * inner).to(weighed.dtype.element_ty)
    tl.store(weighed + row * HIDDEN + unit, kept, mask=inside)
    tl.store(dweights + place, tl.sum(dh * inner, 0).to(dweights.dtype.element_ty))


@triton.jit
@no_type_check
def _slope(x, ACTIVATION: tl.constexpr):
    """The derivative of `_activated`."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        y = (x > 0.0).to(tl.float32)
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    return y


@expert_mlp.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


register_backward(expert_mlp_backward, expert_mlp)
register_flop_formula(torch.ops.headwise.triton_experts, get_raw=True)(forward_flops)
register_flop_formula(torch.ops.headwise.triton_experts_backward, get_raw=True)(backward_flops)
