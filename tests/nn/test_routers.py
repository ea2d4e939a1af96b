"""Routers of heads are the ops that they name; one stage is two even ones."""

import pytest
import torch
from torch.testing import assert_close

from headwise.nn import FittedRouter, HeadBudget, OneStageRouter, QueryNormRouter, TwoStageRouter
from headwise.ops import route_heads, route_heads_by_query_norm

BUDGET = HeadBudget.resolve(7, shared=2, active=5)
GROUPS = HeadBudget.resolve(15, shared=6, active=12, num_groups=5)  # 2 shared, 2 of 3 routed


MODES = pytest.mark.parametrize("mode", ["released", "paper"])
SCORES = pytest.mark.parametrize("scores", ["softmax", "sparsemax", "sigmoid"])


@MODES
@SCORES
def test_two_stage_is_route_heads_of_three_products(mode, scores):
    options = {"mode": mode, "scores": scores}
    router, x = TwoStageRouter(13, BUDGET, std=0.3, **options), torch.randn(2, 3, 13)
    logits = [x @ m(x).T for m in (router.shared, router.routed, router.stage)]
    assert_close(router(x)[:4], route_heads(*logits, top_k=3, **options)[:4])


def test_one_stage_by_hand():
    budget = HeadBudget.resolve(5, shared=2, active=4)
    x = torch.ones(1, 1, 1)
    for mode, gates in (("paper", [1, 1, 1 / 2, 0, 1 / 3]), ("released", [1, 1, 6 / 5, 0, 4 / 5])):
        router = OneStageRouter(1, budget, mode=mode)
        with torch.no_grad():
            router.routed.weight.copy_(torch.tensor([[3.0], [1.0], [2.0]]).log())
        routing = router(x)
        assert_close(routing.weights, torch.tensor([[gates]]))
        assert routing.indices.tolist() == [[[0, 2]]]
        assert_close(routing.probabilities, torch.tensor([[[1 / 2, 1 / 6, 1 / 3]]]))


@SCORES
@pytest.mark.parametrize(
    "budget",
    [
        BUDGET,
        GROUPS,
        HeadBudget.resolve(7, shared=(1, 4), active=5),
        HeadBudget.resolve(3, shared=3, active=3),
    ],
)
def test_one_stage_is_two_stages_with_even_scores(budget, scores):
    one, two = (kind(13, budget, scores=scores) for kind in (OneStageRouter, TwoStageRouter))
    assert {name for name, _ in one.named_parameters()} <= {"routed.weight"}
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.zero_()
    two.load_state_dict(one.state_dict(), strict=False)
    x, mask = torch.randn(2, 3, 13), torch.tensor([[True, False, True], [True, True, True]])
    assert_close(one(x, mask), two(x, mask))


@MODES
def test_one_stage_leaves_shared_heads_at_one(mode):
    budget = HeadBudget.resolve(15, shared=(3, 4, 5, 9, 10, 11), active=12, num_groups=5)
    router, x = OneStageRouter(13, budget, mode=mode), torch.randn(2, 3, 13)
    routing = router(x)
    assert (routing.weights[..., budget.named_shared] == 1).all()
    of_others = [routing.weights[..., 3 * group] for group in (0, 2, 4)]
    none = x.new_zeros(2, 3, 0)
    want = route_heads(none, x @ router.routed(x).T, None, top_k=2, mode=mode)
    assert_close(torch.stack(of_others, -1), want.weights)
    assert_close(routing[1:4], want[1:4])


def test_query_norm_has_no_parameters():
    q = torch.randn(2, 3, 7, 5)
    for scale_by_std in (True, False):
        router = QueryNormRouter(BUDGET, scale_by_std=scale_by_std)
        want = route_heads_by_query_norm(q, shared_heads=2, top_k=3, scale_by_std=scale_by_std)
        assert list(router.parameters()) == []
        assert all(map(torch.equal, router(q)[:4], want[:4]))


def test_query_norms_of_groups_by_hand():
    # Three groups of two heads. Head by head the longest routed query is 4; together the second
    # routed group's 3 and 4 are longest: 5 against 4.
    q = torch.tensor([[[[9.0], [0.0], [4.0], [0.0], [3.0], [4.0]]]])
    budget = HeadBudget.resolve(6, shared=2, active=4, num_groups=3)
    routing = QueryNormRouter(budget, scale_by_std=False)(q)
    assert routing.weights.tolist() == [[[1, 1, 0, 0, 1, 1]]]
    assert routing.indices.tolist() == [[[1]]]
    assert_close(routing.logits, torch.tensor([[[4.0, 5.0]]]))
    # Of 4 and 5 the unbiased deviation is 1/√2.
    scaled = QueryNormRouter(budget)(q).logits
    assert_close(scaled, torch.tensor([[[4.0, 5.0]]]) * 2**0.5)


def test_two_stage_gates_of_groups_by_hand():
    router = TwoStageRouter(
        1, HeadBudget.resolve(8, shared=2, active=4, num_groups=4), mode="paper"
    )
    with torch.no_grad():
        router.routed.weight.copy_(torch.tensor([[1.0], [3.0], [2.0]]).log())
        router.stage.weight.copy_(torch.tensor([[3.0], [1.0]]).log())
    routing = router(torch.ones(1, 1, 1))
    # Stages 3/4 and 1/4; one shared group, and of p = [1/6, 3/6, 2/6] the second.
    assert_close(routing.weights, torch.tensor([[[3 / 4, 3 / 4, 0, 0, 1 / 8, 1 / 8, 0, 0]]]))
    assert_close(routing.probabilities, torch.tensor([[[1 / 6, 3 / 6, 2 / 6]]]))
    assert routing.indices.tolist() == [[[1]]]


def test_maps_score_groups_and_all_heads_of_a_group_get_its_gate():
    for mode in ("released", "paper"):
        router, x = TwoStageRouter(13, GROUPS, mode=mode), torch.randn(2, 3, 13)
        logits = [x @ m(x).T for m in (router.shared, router.routed, router.stage)]
        assert [x.shape[-1] for x in logits] == [2, 3, 2]
        want = route_heads(*logits, top_k=2, mode=mode)
        routing = router(x)
        assert_close(routing[1:4], want[1:4])
        assert routing.weights.shape == (2, 3, 15)
        assert_close(routing.weights[..., 0::3], want.weights)
        for head in (1, 2):
            assert torch.equal(routing.weights[..., head::3], routing.weights[..., 0::3])


def test_the_gradient_of_a_group_is_the_sum_over_its_heads():
    q = torch.randn(2, 3, 15, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 15, dtype=torch.float64)
    (got,) = torch.autograd.grad((QueryNormRouter(GROUPS)(q).weights * upstream).sum(), q)
    z = q.square().sum(-1).unflatten(-1, (5, 3)).sum(-1).sqrt()[..., 2:]
    p = (z / z.std(-1, keepdim=True)).softmax(-1)
    (want,) = torch.autograd.grad((p * upstream.unflatten(-1, (5, 3)).sum(-1)[..., 2:]).sum(), q)
    assert_close(got, want)


def filled(budget):
    router = FittedRouter(13, budget)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def test_fitted_gates_are_the_gains_of_what_scores_most():
    router, x = filled(BUDGET), torch.randn(2, 3, 13)
    routing = router(x)
    scores = x @ router.weight.T + router.bias
    assert_close(routing.logits, scores)
    kept = torch.zeros(2, 3, 7)
    kept[..., :2] = 1
    kept.scatter_(-1, 2 + scores.topk(3, dim=-1).indices, 1.0)
    assert_close(routing.weights, kept * router.gain)
    groups = filled(GROUPS)
    gates = groups(x).weights.unflatten(-1, (5, 3))
    assert (gates == gates[..., :1]).all()
    assert ((gates != 0).sum((-1, -2)) == 12).all()


def test_a_fitted_router_without_a_choice_has_no_parameters():
    budget = HeadBudget.resolve(7, shared=0, active=7)
    router = FittedRouter(13, budget)
    assert not list(router.parameters())
    assert router.is_dense
    assert (router(torch.randn(2, 3, 13)).weights == 1).all()
    assert not filled(BUDGET).is_dense


def test_all_that_is_fitted_has_gradients():
    router, x = filled(BUDGET), torch.randn(2, 3, 13, requires_grad=True)
    (router(x).weights * torch.randn(2, 3, 7)).sum().backward()
    assert x.grad.any()
    assert all(parameter.grad.any() for parameter in router.parameters())
