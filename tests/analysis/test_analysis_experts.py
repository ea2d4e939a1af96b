import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from headwise.analysis.experts import (
    count_overlap,
    effective_experts,
    expert_use,
    overlap_by_chance,
    specialisation,
    specialisation_by_chance,
)
from headwise.analysis.measure import LoadMeter, count_experts, load_entropy
from headwise.analysis.permutation import permutation_test
from headwise.analysis.records import ExpertLoads
from headwise.ops import ExpertRouting, route_tokens


def chosen(indices, num_experts=7):
    """Tokens of one sequence: [T][h][K]."""
    indices = torch.tensor([indices])
    probabilities = torch.full((*indices.shape[:-1], num_experts), 1 / num_experts)
    return ExpertRouting(indices.float(), indices, probabilities, probabilities.log())


TOKENS = [[[0, 1], [1, 2], [3, 0]], [[0, 1], [0, 1], [2, 3]], [[4, 5], [4, 5], [5, 4]]]


def test_overlap_by_hand():
    assert count_overlap(chosen(TOKENS[:2])).share() == pytest.approx(1 / 3)
    # The same experts in another order are the same experts.
    assert count_overlap(chosen(TOKENS[2:])).share() == 1
    assert count_overlap(chosen([[[0], [1]], [[2], [3]]])).share() == 0


def test_padding_does_not_overlap():
    masked = chosen(TOKENS).with_mask(torch.tensor([[[True], [True], [False]]]))
    assert count_overlap(masked) == count_overlap(chosen(TOKENS[:2]))
    # A mask that was set without switching the padding off counts just as well.
    assert count_overlap(chosen(TOKENS)._replace(mask=masked.mask)) == count_overlap(masked)
    nobody = torch.zeros(1, 3, 1, dtype=torch.bool)
    assert count_overlap(chosen(TOKENS).with_mask(nobody)).share() is None


def test_one_sub_token_has_no_overlap():
    assert count_overlap(route_tokens(torch.randn(2, 3, 1, 5), top_k=2)).share() is None


def test_overlap_needs_sub_tokens():
    with pytest.raises(ValueError, match=r"\[2, 3, 2\]; they must be \[B, T, h, K\]"):
        count_overlap(route_tokens(torch.randn(2, 3, 5), top_k=2))


def test_overlap_is_that_of_sets():
    routing = route_tokens(torch.randn(3, 11, 5, 13), top_k=7)
    tokens = routing.indices.flatten(0, 1).tolist()
    shares = [
        len(set(a) & set(b)) / 7 for sub_tokens in tokens for a, b in combinations(sub_tokens, 2)
    ]
    assert count_overlap(routing).share() == pytest.approx(sum(shares) / len(shares))


def test_overlap_at_random_is_k_of_e():
    routing = route_tokens(torch.randn(1, 5000, 3, 13), top_k=2)
    assert count_overlap(routing).share() == pytest.approx(2 / 13, abs=0.005)


def test_overlap_by_chance_by_hand():
    assert overlap_by_chance([0.5, 0.25, 0.25, 0], 2) == pytest.approx(3 / 4)
    assert overlap_by_chance([7] * 13, 2) == pytest.approx(2 / 13)
    assert overlap_by_chance([0, 3, 3], 2) == 1


def test_overlap_at_random_at_uneven_loads():
    """Sub-tokens that do not know of each other, with experts of which some are favoured."""
    favoured = torch.linspace(0, 2, 13)
    routing = route_tokens(torch.randn(1, 5000, 3, 13) + favoured, top_k=2)
    chance = overlap_by_chance(count_experts(routing).load(), 2)
    assert count_overlap(routing).share() == pytest.approx(chance, abs=0.005)
    assert chance > 2 / 13 + 0.03


def test_overlap_of_many_forwards_is_that_of_one():
    meter = LoadMeter(count_overlap)
    for token in TOKENS:
        meter.add("code", [chosen([token])])
    assert meter.counts() == {"code": [count_overlap(chosen(TOKENS))]}


def test_effective_experts_by_hand():
    assert effective_experts([0.5, 0.25, 0.25, 0]) == pytest.approx(math.sqrt(8))
    assert effective_experts([0, 3, 0]) == 1
    assert effective_experts([7] * 5) == pytest.approx(5)
    load = torch.rand(11)
    assert effective_experts(load) == pytest.approx(11 ** load_entropy(load))


def test_specialisation_by_hand():
    assert specialisation([[0.5, 0.5, 0], [0, 0.5, 0.5]]) == pytest.approx(0.5)
    assert specialisation([[1, 2, 0], [3, 6, 0], [5, 10, 0]]) == 0
    assert specialisation([[1, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 2]]) == pytest.approx(1)
    assert specialisation([[0.5, 0.5]]) is None
    with pytest.raises(ValueError, match="sums to 0"):
        specialisation([[1, 0], [0, 0]])


def test_specialisation_by_chance_by_hand():
    assert specialisation_by_chance(5, [100, 100]) == pytest.approx(0.01 / math.log(2))
    assert specialisation_by_chance(1, [7, 5]) == 0
    assert specialisation_by_chance(5, [100]) is None


@pytest.mark.parametrize("assignments", [(500, 500), (300, 700, 1100)])
def test_domains_that_do_not_differ_come_to_what_chance_makes(assignments):
    generator = np.random.default_rng(0)
    p = [0.4, 0.3, 0.1, 0.1, 0.05, 0.05]
    drawn = [
        specialisation([generator.multinomial(n, p).tolist() for n in assignments])
        for _ in range(2000)
    ]
    assert np.mean(drawn) == pytest.approx(specialisation_by_chance(6, assignments), rel=0.06)


def test_use_of_each_layer_and_domain():
    experts = ExpertLoads(
        [1, 3],
        {"code": [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], "prose": [[0.5, 0.5, 0, 0], [0, 0, 1.0, 0]]},
        top_k=1,
        assignments={"code": [100, 100], "prose": [50, 50]},
        overlap={"code": [0.5, None], "prose": [0.0, None]},
    )
    uses = {(use.layer, use.domain): use for use in expert_use(experts)}
    assert list(uses) == [(1, "code"), (1, "prose"), (3, "code"), (3, "prose")]
    first, last = uses[1, "prose"], uses[3, "prose"]
    assert first[2:7] == (4, 2, pytest.approx(2), pytest.approx(0.5), 0.5)
    assert (first.overlap, first.overlap_by_chance) == (0, 1 / 2)
    assert (last.overlap, last.overlap_by_chance) == (None, None)
    assert last.specialisation == pytest.approx(1)
    # (2 - 1) / 2 · 1/4 · (1/100 + 1/50) / ln 2, with two experts used; three in the other layer.
    assert first.specialisation_by_chance == pytest.approx(0.00375 / math.log(2))
    assert last.specialisation_by_chance == pytest.approx(2 * first.specialisation_by_chance)
    assert first.p_value is None
    found = permutation_test([np.eye(4)] * 2, ["code"] * 2 + ["prose"] * 2, permutations=99)
    found = replace(found, layers=[replace(found.layers[0], p_value=p) for p in (0.25, 0.5)])
    tested = expert_use(replace(experts, difference=found))
    assert [use.p_value for use in tested] == [0.25, 0.25, 0.5, 0.5]
