"""sparsemax: worked by hand, the projection onto the simplex, its gradient; sigmoids' shares."""

import pytest
import torch
from torch.testing import assert_close

from headwise.ops import sparsemax
from headwise.ops.scores import affinities


@pytest.mark.parametrize(
    ("logits", "want"),
    [
        ([0.8, 0.6, -1.0], [0.6, 0.4, 0.0]),
        ([3.0, 1.0, 2.5, 1.5], [0.75, 0.0, 0.25, 0.0]),
        ([2.0, 1.0, 0.0], [1.0, 0.0, 0.0]),  # the second is just not on
        ([0.1, 0.1, 0.1, 0.1], [0.25] * 4),
        ([7.0], [1.0]),
        ([], []),
    ],
)
def test_sparsemax_by_hand(logits, want):
    got = sparsemax(torch.tensor(logits, dtype=torch.float64))
    assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-15)
    assert [p == 0 for p in got.tolist()] == [p == 0 for p in want]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_sparsemax_is_the_nearest_point_of_the_simplex(scale):
    """By the optimality conditions: one τ, p = z - τ where p > 0, and z ≤ τ where p = 0."""
    z = scale * torch.randn(2, 11, 13, dtype=torch.float64)
    p = sparsemax(z)
    assert (p >= 0).all()
    assert_close(p.sum(-1), torch.ones(2, 11, dtype=torch.float64))
    on = p > 0
    threshold = torch.where(on, z - p, 0).sum(-1, keepdim=True) / on.sum(-1, keepdim=True)
    assert_close(torch.where(on, z - p, threshold), threshold.expand_as(z))
    assert (z <= threshold + 1e-12)[~on].all()
    assert on.all() if scale == 0.01 else not on.all()


def test_the_gradient_of_sparsemax_is_exact():
    z = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert 0 < (sparsemax(z) == 0).float().mean() < 1
    assert torch.autograd.gradcheck(sparsemax, (z,))


def test_sparsemax_of_equal_logits_keeps_all_of_them():
    for value in (0.0, 1e4, -1e4):
        assert (sparsemax(torch.full((3, 101), value)) == sparsemax(torch.zeros(1))[0] / 101).all()


def test_sigmoids_share_by_their_sum_even_where_they_underflow():
    logits = torch.tensor([[0.0, 0.0, -1000.0], [-1000.0, -1000.0, -1001.0]])
    p, shares = affinities(logits, "sigmoid")
    assert_close(p[0], torch.tensor([0.5, 0.5, 0.0]))
    e = torch.tensor([1.0, 1.0, torch.e**-1])
    assert_close(shares, torch.stack([torch.tensor([0.5, 0.5, 0.0]), e / e.sum()]))
