"""Rows in runs, each run times a matrix of its own.

On GPUs torch's grouped product computes it; elsewhere, and for widths that torch's kernel does not
compute, one matrix product after the other. What is exported multiplies all rows by all matrices.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grouped_mm, pad
from torch.utils.flop_counter import register_flop_formula

from headwise.ops.experts.grouped_mm import computes
from headwise.ops.gradients import by_torch_alone


def grouped_product(
    rows: Float[Tensor, "M D"], matrices: Float[Tensor, "E O D"], ends: Int[Tensor, "E"]
) -> Float[Tensor, "M O"]:
    """y[i] = matrices[e] · rows[i] where ends[e-1] ≤ i < ends[e] (from 0); 0 from the last end on.

    Args:
        rows: Sorted by matrix.
        matrices: In the dtype of rows.
        ends: int32, where the run of each matrix ends; ascending.

    Example (worked by hand): rows 1, 2, 3, 4 of width 1, matrices 5 and 7, ends 1 and 3 give
    5, 14, 21, 0.
    """
    if by_torch_alone():
        place, starts = torch.arange(rows.shape[0], device=rows.device), pad(ends, (1, -1))
        own = (starts.unsqueeze(1) <= place) & (place < ends.unsqueeze(1))
        return (torch.where(own.unsqueeze(2), rows, 0) @ matrices.mT).sum(0)
    if rows.device.type != "cuda" or not computes(rows, matrices.mT):
        return looped_product(rows, matrices, ends)
    # The kernel leaves what follows the last end as it was, in the backward too.
    counts = (torch.arange(rows.shape[0], device=rows.device) < ends[-1]).unsqueeze(1)
    product = grouped_mm(torch.where(counts, rows, 0), matrices.mT, offs=ends)
    return torch.where(counts, product, 0)


@torch.library.custom_op("headwise::looped_product", mutates_args=())
def looped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product`, one matrix after the other."""
    y = rows.new_zeros(len(rows), matrices.shape[1])
    for matrix, run in _runs(matrices, ends):
        torch.mm(rows[run], matrix.T, out=y[run])
    return y


@torch.library.custom_op("headwise::looped_outer_product", mutates_args=())
def looped_outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """[E, O, D]: the sum over each run of the outer products of left [M, O] and right [M, D]."""
    y = left.new_zeros(len(ends), left.shape[1], right.shape[1])
    for matrix, run in _runs(y, ends):
        torch.mm(left[run].T, right[run], out=matrix)
    return y


def _runs(matrices: Tensor, ends: Tensor) -> Iterator[tuple[Tensor, slice]]:
    for matrix, (start, end) in zip(matrices, pairwise([0, *ends.tolist()]), strict=True):
        if start < end:
            yield matrix, slice(start, end)


@looped_product.register_fake
def _(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[1])


@looped_outer_product.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, matrices, ends = ctx.saved_tensors
    return looped_product(dy, matrices.mT, ends), looped_outer_product(dy, rows, ends), None


looped_product.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.headwise.looped_product, get_raw=True)
def _flops(rows: Tensor, matrices: Tensor, ends: Tensor, **_: Any) -> int:
    return 2 * int(ends[-1]) * matrices[0].numel()


@register_flop_formula(torch.ops.headwise.looped_outer_product, get_raw=True)
def _outer_flops(left: Tensor, right: Tensor, ends: Tensor, **_: Any) -> int:
    return 2 * int(ends[-1]) * left.shape[1] * right.shape[1]
