"""Runs of rows times a matrix each: by hand, against plain products, contracts of its ops."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from headwise.ops.grouped_product import grouped_product, looped_outer_product, looped_product

ENDS = {"spread": [2, 5, 11], "empty runs": [0, 7, 7], "nothing": [0, 0, 0], "all": [3, 6, 13]}


def leaves():
    shapes = (13, 5), (3, 7, 5)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_by_hand():
    rows, matrices = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[[5.0]], [[7.0]]])
    ends = torch.tensor([1, 3], dtype=torch.int32)
    assert grouped_product(rows, matrices, ends).flatten().tolist() == [5, 14, 21, 0]


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_it_is_a_product_a_run_in_values_and_gradients(ends):
    rows, matrices = leaves()
    got = grouped_product(rows, matrices, torch.tensor(ends, dtype=torch.int32))
    runs = zip([0, *ends], ends, matrices, strict=False)
    products = [rows[start:end] @ matrix.T for start, end, matrix in runs]
    want = torch.cat([*products, 0 * rows[ends[-1] :, :1].expand(-1, 7)])
    upstream = torch.randn(13, 7, dtype=torch.float64)
    results = [(y, torch.autograd.grad(y, [rows, matrices], upstream)) for y in (got, want)]
    assert_close(*results)


def test_custom_ops_keep_their_contracts():
    rows, matrices = leaves()
    ends = torch.tensor(ENDS["spread"], dtype=torch.int32)
    torch.library.opcheck(looped_product, (rows, matrices, ends))
    left = torch.randn(13, 7, dtype=torch.float64)
    torch.library.opcheck(looped_outer_product, (left, rows.detach(), ends))


def test_flops_count_the_rows_in_runs():
    rows, matrices = leaves()
    ends = torch.tensor(ENDS["spread"], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        grouped_product(rows, matrices, ends).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 11 * 5 * 7
