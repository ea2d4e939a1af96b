"""HeadBudget: counts, shares, rounding, errors that name field and value."""

import dataclasses

import pytest

from headwise.nn import HeadBudget


@pytest.mark.parametrize(
    ("num_heads", "shared", "active", "counts"),
    [
        (12, 3, 9, (3, 9)),
        (12, 0.25, 0.75, (3, 9)),
        (12, 3, 0.75, (3, 9)),
        (10, 0.7, 1.0, (7, 10)),
        (7, 0, 1, (0, 1)),
        (7, 0.0, 1.0, (0, 7)),
        (7, 7, 7, (7, 7)),
        (1, 0, 1, (0, 1)),
        (1, 1, 1, (1, 1)),
        (6, 0.4, 0.75, (2, 5)),
    ],
)
def test_counts_stay_and_shares_round_to_the_nearest(num_heads, shared, active, counts):
    budget = HeadBudget.resolve(num_heads, shared=shared, active=active)
    assert (budget.shared_heads, budget.active_heads) == counts
    assert budget.routed_heads == num_heads - budget.shared_heads
    assert budget.top_k == budget.active_heads - budget.shared_heads
    assert budget.active_share == budget.active_heads / num_heads


def test_what_was_rounded_is_said():
    budget = HeadBudget.resolve(6, shared=0.4, active=0.75)
    assert str(budget) == (
        "heads=6: 2 shared + 3 of 4 routed = 5 active "
        "(shared_heads 0.4 of 6 = 2.4 rounded to 2; active_heads 0.75 of 6 = 4.5 rounded to 5)"
    )
    for shared, active in ((3, 7), (0.3, 0.7)):
        exact = HeadBudget.resolve(10, shared=shared, active=active)
        assert str(exact) == "heads=10: 3 shared + 4 of 7 routed = 7 active"


@pytest.mark.parametrize(
    ("num_heads", "shared", "active", "message"),
    [
        (0, 0, 1, "num_heads is 0"),
        (7, 0, 8, r"active_heads is 8.*0\.\.7"),
        (7, 8, 7, r"shared_heads is 8.*0\.\.7"),
        (7, -1, 3, "shared_heads is -1"),
        (7, 1, -3, "active_heads is -3"),
        (7, 0.2, 1.5, r"active_heads is 1\.5"),
        (7, -0.2, 0.5, r"shared_heads is -0\.2"),
        (7, float("nan"), 3, "shared_heads is nan"),
        (7, True, 3, "shared_heads is True"),
        (7, 1, False, "active_heads is False"),
        (7, "2", 3, "shared_heads is '2'"),
        (7, 1, None, "active_heads is None"),
        (7, 0, 0, "active_heads is 0"),
        (7, 0, 0.01, r"active_heads is 0\.01"),
        (7, 5, 3, "shared_heads is 5, more than active_heads = 3"),
        (7, 3, 3, "shared_heads equals active_heads = 3.* 4 of the 7"),
        (7, 0.4, 0.45, "shared_heads equals active_heads = 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_field_and_the_value(num_heads, shared, active, message):
    with pytest.raises(ValueError, match=message):
        HeadBudget.resolve(num_heads, shared=shared, active=active)


def test_it_is_frozen():
    budget = HeadBudget.resolve(7, shared=2, active=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.active_heads = 6
