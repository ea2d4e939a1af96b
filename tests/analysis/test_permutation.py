"""Whether domains differ: by hand, under the null, and with a difference put in."""

from itertools import combinations

import numpy as np
import pytest

from headwise.analysis.permutation import permutation_test

FOUR = [np.array([[0.1], [0.3], [0.5], [0.7]])]


def test_one_head_by_hand():
    found = permutation_test(FOUR, ["a", "a", "b", "b"])
    assert found.documents == {"a": 2, "b": 2}
    assert found.over_all.statistic == pytest.approx(0.04)
    assert found.over_all.total == pytest.approx(0.05)
    # Of six ways two come to 0.04, two to 0.01 and two to 0.
    assert found.over_all.by_chance == pytest.approx(0.1 / 6, abs=5e-4)
    assert found.over_all.p_value == pytest.approx(1 / 3, abs=0.02)
    (layer,) = found.layers
    assert layer.effects == pytest.approx([40])
    assert layer.p_values == [layer.p_value] == [found.over_all.p_value]


def test_documents_weigh_what_they_hold():
    # Means are (0.1 + 3 · 0.3) / 4 = 0.25 and 0.6, that of all (4 · 0.25 + 2 · 0.6) / 6.
    found = permutation_test(FOUR, ["a", "a", "b", "b"], weights=[1, 3, 1, 1])
    mean = 2.2 / 6
    assert found.layers[0].effects == pytest.approx([35])
    between = 4 / 6 * (0.25 - mean) ** 2 + 2 / 6 * (0.6 - mean) ** 2
    assert found.over_all.statistic == pytest.approx(between)
    total = (np.array([1, 3, 1, 1]) / 6) @ (FOUR[0][:, 0] - mean) ** 2
    assert found.over_all.total == pytest.approx(total)


def test_every_way_to_deal_out_the_groups():
    """Three groups of two, two layers: p-values of 90 ways, each written out."""
    x = np.random.default_rng(3).random((6, 5))
    x[:2] += [0.9, 0.2, 0, 0, 0]
    ways = [
        (a, b, tuple(sorted({*range(6)} - {*a, *b})))
        for a in combinations(range(6), 2)
        for b in combinations(sorted({*range(6)} - set(a)), 2)
    ]
    between = np.array([
        sum((x[list(group)].mean(0) - x.mean(0)) ** 2 for group in way) / 3 for way in ways
    ])  # fmt: skip
    (observed,) = (
        row for row, way in zip(between, ways, strict=True) if way[:2] == ((0, 1), (2, 3))
    )
    shares, share = between / x.var(0), observed / x.var(0)

    found = permutation_test([x[:, :3], x[:, 3:]], list("aabbcc"))
    assert found.over_all.statistic == pytest.approx(observed.sum())
    assert found.over_all.total == pytest.approx(x.var(0).sum())
    reached = between.sum(1) >= observed.sum() - 1e-12
    assert found.over_all.p_value == pytest.approx(reached.mean(), abs=0.02)
    for layer, part in zip(found.layers, (slice(3), slice(3, 5)), strict=True):
        reached = between[:, part].sum(1) >= observed[part].sum() - 1e-12
        assert layer.p_value == pytest.approx(reached.mean(), abs=0.02)
        means = x[:, part].reshape(3, 2, -1).mean(1)
        assert layer.effects == pytest.approx(100 * (means.max(0) - means.min(0)))
        largest = shares.max(1)[:, None] >= share[part] - 1e-12
        assert layer.p_values == pytest.approx(largest.mean(0).tolist(), abs=0.02)


def test_p_values_are_uniform_where_nothing_differs():
    over_all, least = [], []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        loads = [generator.beta(2, 5, (23, heads)) for heads in (3, 5)]
        weights = generator.integers(50, 1000, 23)
        groups = list("a" * 13 + "b" * 7 + "c" * 3)
        found = permutation_test(loads, groups, weights=weights, permutations=199, seed=seed)
        over_all.append(found.over_all.p_value)
        least.append(min(p for layer in found.layers for p in layer.p_values))
    for p in (over_all, least):
        assert 0.4 < np.mean(p) < 0.6
        assert np.mean(np.array(p) <= 0.05) <= 0.1
        assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.12)


def test_a_difference_is_found_where_it_is():
    loads = [np.random.default_rng(0).random((29, 7)) for _ in range(3)]
    loads[1][:13, 5] += 1.5
    found = permutation_test(loads, ["code"] * 13 + ["prose"] * 16)
    assert found.over_all.p_value < 0.01
    assert found.layers[1].p_value < 0.01 < 0.05 < found.layers[0].p_value
    small = [
        (i, j) for i, x in enumerate(found.layers) for j, p in enumerate(x.p_values) if p < 0.05
    ]
    assert small == [(1, 5)]
    assert found.layers[1].effects[5] > 100
    assert found.layers[1].p_values[5] == 1 / 10_000


def test_the_order_of_documents_does_not_matter():
    generator = np.random.default_rng(1)
    x, weights = generator.random((17, 5)), generator.integers(1, 9, 17)
    groups = ["b"] * 6 + ["a"] * 11
    order = generator.permutation(17)
    first = permutation_test([x], groups, weights=weights, permutations=499)
    again = permutation_test(
        [x[order]], [groups[i] for i in order], weights=weights[order], permutations=499
    )
    assert first == again
    assert list(first.documents) == ["a", "b"]
    other = permutation_test([x], groups, weights=weights, permutations=499, seed=1)
    assert other.over_all.p_value != first.over_all.p_value
    assert other.over_all.statistic == first.over_all.statistic


def test_what_does_not_vary_does_not_differ():
    """A head that is on for every token, and one whose load is 1/3 everywhere: rounded, not 0."""
    fixed = np.tile([1.0, 1 / 3], (7, 1))
    groups, weights = list("aaabbbb"), [3, 7, 11, 13, 17, 19, 23]
    found = permutation_test([fixed], groups, weights=weights)
    assert (found.over_all.statistic, found.over_all.total) == (0, 0)
    assert found.over_all.p_value == 1
    assert (found.layers[0].effects, found.layers[0].p_values) == ([0, 0], [1, 1])
    moving = np.random.default_rng(0).random((7, 1))
    both = permutation_test([fixed, moving], groups, weights=weights)
    assert both.layers[0].p_values == [1, 1]
    assert both.over_all.p_value == both.layers[1].p_value < 1


def test_equal_means_tie_with_all_others():
    # Both groups have the loads 0.1 and 0.7: what is observed is the least there is, but rounded.
    found = permutation_test([np.array([[0.1], [0.7], [0.7], [0.1]])], list("aabb"))
    assert found.over_all.p_value == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ["a"] * 4}, r"groups names \['a'\]; there must be two or more"),
        ({"groups": list("aaab")}, "groups has one document of 'b'; each group must have two"),
        ({"loads": []}, "loads is empty"),
        ({"loads": [np.ones((3, 2))]}, r"loads\[0\] is \[3, 2\]; groups has 4 documents"),
        ({"loads": [np.ones((4, 1)), np.ones(4)]}, r"loads\[1\] is \[4\]"),
        ({"loads": [np.ones((4, 0))]}, r"loads\[0\] is \[4, 0\]"),
        ({"loads": [np.full((4, 1), np.nan)]}, r"loads\[0\] holds values that are not finite"),
        ({"weights": [1, 2, 3]}, r"weights is \[3\]; it must be \[4\]"),
        ({"weights": [1, 2, 3, 0]}, r"weights has entries down to 0\.0; all must be above 0"),
        ({"permutations": 0}, "permutations is 0; it must be at least 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_cannot_be_tested_is_refused(changes, message):
    arguments = {"loads": FOUR, "groups": list("aabb")} | changes
    with pytest.raises(ValueError, match=message):
        permutation_test(**arguments)
