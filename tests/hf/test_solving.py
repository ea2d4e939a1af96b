"""The closed forms behind fitted routers, against ways to the same that take longer."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from headwise.hf.fitting.solving import RidgeRegression, gains, spend


def test_costs_worked_by_hand():
    costs = [[9, 5, 1], [8, 3, 2]]
    assert spend(costs, 4, least=1) == [2, 2]
    assert spend(costs, 3, least=1) == [2, 1]
    assert spend(costs, 6, least=1) == [3, 3]


@pytest.mark.parametrize("least", [1, 2])
def test_no_other_budget_costs_less_where_later_ranks_are_cheaper(least):
    generator = torch.Generator().manual_seed(least)
    for _ in range(20):
        costs = [
            torch.rand(4, generator=generator).sort(descending=True)[0].tolist() for _ in "abc"
        ]
        for total in range(3 * least, 13):
            kept = spend(costs, total, least=least)
            others = itertools.product(range(least, 5), repeat=3)
            lost = [
                sum(sum(row[k:]) for row, k in zip(costs, other, strict=True))
                for other in others
                if sum(other) == total
            ]
            found = sum(sum(row[k:]) for row, k in zip(costs, kept, strict=True))
            assert sum(kept) == total
            assert found == pytest.approx(min(lost))


def test_a_linear_map_is_found_again_and_noise_is_its_variance():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 7, generator=generator), torch.tensor([5.0, -1.0, 0.0])
    noise = torch.tensor([0.0, 0.1, 0.5])
    regression = RidgeRegression(7, 3)
    for part in range(40):
        x = torch.randn(100, 7, generator=generator)
        y = x @ weight.T + bias + noise * torch.randn(100, 3, generator=generator)
        regression.add(x, y, held_out=part % 8 == 1)
    fit = regression.solve()
    assert regression.num_rows == 4000
    assert_close(fit.weight, weight, atol=0.03, rtol=0)
    assert_close(fit.bias, bias, atol=0.03, rtol=0)
    assert_close(fit.variance.sqrt(), noise, atol=0.03, rtol=0)


def test_of_few_rows_a_large_penalty_is_chosen_and_of_many_a_small_one():
    """What is fitted to noise on few rows is near the mean alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = {}
    for rows in (30, 3000):
        regression = RidgeRegression(20, 1)
        for part in range(8):
            x = torch.randn(rows, 20, generator=generator)
            y = 0.3 * x[:, :1] + torch.randn(rows, 1, generator=generator)
            regression.add(x[: rows // 8 + 1], y[: rows // 8 + 1], held_out=part == 1)
        sizes[rows] = regression.solve().weight
    wanted = torch.zeros(1, 20)
    wanted[0, 0] = 0.3
    few, many = ((w - wanted).norm() for w in sizes.values())
    assert many < 0.1 < few < 1


def test_sums_are_float64():
    """A feature of 1e4 and one of 1e-4 beside it: in float32 their products would be lost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 2, generator=generator, dtype=torch.float64)
    x = (x + torch.tensor([0.0, 3e4], dtype=torch.float64)).float()
    y = x[:, :1] - 3
    regression = RidgeRegression(2, 1)
    for part in range(8):
        regression.add(x, y, held_out=part == 1)
    # The smallest penalty leaves 1e-6 of 3e4 squared, so the first weight is drawn to 0; not NaN.
    fit = regression.solve()
    assert fit.weight.isfinite().all()
    assert_close(x @ fit.weight.T + fit.bias, y, atol=4, rtol=0)


def test_gains_are_those_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(50, 4, 6, generator=generator, dtype=torch.float64)
    mask = (torch.rand(50, 4, generator=generator) < 0.7).double()
    mask[:, 3] = 1
    on = v * mask.unsqueeze(-1)
    sums = torch.einsum("nud,nwd->uw", on, on)
    with_all = torch.einsum("nud,nd->u", on, v.sum(1))
    rows, target = on.permute(0, 2, 1).reshape(-1, 4), v.sum(1).reshape(-1)
    want = torch.linalg.lstsq(rows, target.unsqueeze(-1)).solution.squeeze(-1)
    assert_close(gains(sums, with_all), want.float(), atol=1e-3, rtol=1e-3)


def test_what_is_never_on_or_alone_has_a_gain_of_1():
    sums = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert_close(gains(sums, torch.tensor([2.0, 0.0], dtype=torch.float64)), torch.ones(2))
