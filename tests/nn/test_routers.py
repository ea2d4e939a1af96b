"""The cosine router's formula; the two-stage and query-norm routers are the ops they name."""

import math

import torch
from torch.testing import assert_close

from headwise.nn import CosineRouter, HeadBudget, LinearRouter, QueryNormRouter, TwoStageRouter
from headwise.ops import route_heads, route_heads_by_query_norm, route_tokens

BUDGET = HeadBudget.resolve(7, shared=2, active=5)
GROUPS = HeadBudget.resolve(15, shared=6, active=12, num_groups=5)  # 2 shared, 2 of 3 routed


def test_cosine_by_hand():
    router = CosineRouter(2, 3, top_k=1, projection_dim=2)
    with torch.no_grad():
        router.projection.copy_(2 * torch.eye(2))
        router.embedding.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0], [-3.0, -4.0]]))
        router.log_temperature.fill_(math.log(0.5))
    # Cosines of (3, 4) with the three embeddings, over a temperature of 1/2.
    assert_close(router(torch.tensor([[3.0, 4.0]])).logits, torch.tensor([[1.2, 1.6, -2.0]]))


def test_cosine_starts_at_temperature_seven_hundredths_and_ignores_the_length():
    router, x = CosineRouter(13, 7, top_k=2).double(), torch.randn(11, 13, dtype=torch.float64)
    routing = router(x)
    assert (routing.logits.abs() <= 1 / 0.07 + 1e-3).all()
    assert_close(routing.logits, router(100 * x).logits)
    # A token of zeros has no direction: all experts tie and the lowest win.
    assert router(torch.zeros(1, 13)).indices.tolist() == [[0, 1]]


def test_linear_is_route_tokens_of_a_product():
    router, x = LinearRouter(13, 7, top_k=3, normalize_top_k=False), torch.randn(2, 5, 13)
    want = route_tokens(x @ router.weight.T, top_k=3, normalize=False)
    assert_close(router(x)[:4], want[:4])


def test_two_stage_is_route_heads_of_three_products():
    for mode in ("released", "paper"):
        router, x = TwoStageRouter(13, BUDGET, mode=mode), torch.randn(2, 3, 13)
        logits = [x @ m().T for m in (router.shared, router.routed, router.stage)]
        assert_close(router(x)[:4], route_heads(*logits, top_k=3, mode=mode)[:4])


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
        logits = [x @ m().T for m in (router.shared, router.routed, router.stage)]
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
