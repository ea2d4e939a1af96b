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
    budget = HeadBudget.resolve(6, shared=1, active=0.75, names=("fixed", "on"))
    assert budget.rounded == ("on 0.75 of 6 = 4.5 rounded to 5",)
    for shared, active in ((3, 7), (0.3, 0.7)):
        exact = HeadBudget.resolve(10, shared=shared, active=active)
        assert str(exact) == "heads=10: 3 shared + 4 of 7 routed = 7 active"


@pytest.mark.parametrize(
    ("num_heads", "shared", "active", "message"),
    [
        (0, 0, 1, "num_heads is 0"),
        (7, 0, 8, r"active_heads is 8.*1\.\.7"),
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
        (7, 0, 0, "active_heads is 0; .* int of at least 1 or a number above 0 and at most 1$"),
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


@pytest.mark.parametrize(
    ("num_heads", "num_groups", "shared", "active", "groups"),
    [
        (8, 4, 2, 6, (1, 3, 2)),
        (8, 4, 0, 2, (0, 4, 1)),
        (8, 4, 0.25, 0.75, (1, 3, 2)),
        (8, 4, 0.4, 0.7, (2, 2, 1)),  # 1.6 and 2.8 groups
        (6, 2, 0.4, 0.75, (1, 1, 1)),  # 0.8 and 1.5 groups
        (6, 1, 0.4, 0.75, (0, 1, 1)),
        (6, 3, 6, 6, (3, 0, 0)),
    ],
)
def test_counts_are_of_heads_in_whole_groups(num_heads, num_groups, shared, active, groups):
    budget = HeadBudget.resolve(num_heads, shared=shared, active=active, num_groups=num_groups)
    size = num_heads // num_groups
    assert budget.heads_per_group == size
    assert (len(budget.shared_groups), budget.routed_groups, budget.kept_groups) == groups
    heads = (budget.shared_heads, budget.routed_heads, budget.top_k)
    assert heads == tuple(size * count for count in groups)
    assert budget.active_share == (groups[0] + groups[2]) / num_groups


def test_rounding_to_whole_groups_is_said():
    budget = HeadBudget.resolve(8, shared=0.25, active=0.7, num_groups=4)
    assert str(budget) == (
        "heads=8 in groups of 2: 2 shared + 4 of 6 routed = 6 active "
        "(active_heads 0.7 of 8 = 5.6 rounded to 6)"
    )


def test_groups_of_one_head_are_heads():
    for options in ({"shared": 2, "active": 5}, {"shared": 0.4, "active": 0.75}):
        alone = HeadBudget.resolve(7, **options)
        assert HeadBudget.resolve(7, **options, num_groups=7) == alone
        groups = (len(alone.shared_groups), alone.routed_groups, alone.kept_groups)
        assert groups == (alone.shared_heads, alone.routed_heads, alone.top_k)


@pytest.mark.parametrize(
    ("shared", "active", "num_groups", "message"),
    [
        (1, 4, 4, "shared_heads is 1; whole groups of 2 heads.* multiple of 2, such as 2"),
        (0, 7, 2, "active_heads is 7; whole groups of 4 heads.* multiple of 4, such as 8"),
        (0, 0.1, 2, r"active_heads is 0\.1; at least 4 of 8"),
        (4, 4, 2, "shared_heads equals active_heads = 4.* 4 of the 8"),
        (0.5, 0.6, 2, "shared_heads equals active_heads = 4"),
        (0, 4, 3, "num_groups is 3; it must divide num_heads = 8"),
        (0, 4, 0, "num_groups is 0"),
    ],
)
def test_errors_of_groups_name_the_field_and_the_value(shared, active, num_groups, message):
    with pytest.raises(ValueError, match=message):
        HeadBudget.resolve(8, shared=shared, active=active, num_groups=num_groups)


def test_it_is_frozen():
    budget = HeadBudget.resolve(7, shared=2, active=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.active_heads = 6
