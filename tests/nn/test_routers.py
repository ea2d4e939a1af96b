"""The cosine router's formula; the two-stage and query-norm routers are the ops they name."""

import math

import torch
from torch.testing import assert_close

from headwise.nn import CosineRouter, HeadBudget, LinearRouter, QueryNormRouter, TwoStageRouter
from headwise.ops import route_heads, route_heads_by_query_norm, route_tokens

BUDGET = HeadBudget.resolve(7, shared=2, active=5)


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
        logits = [router.shared(x), router.routed(x), router.stage(x)]
        assert_close(router(x)[:4], route_heads(*logits, top_k=3, mode=mode)[:4])


def test_query_norm_has_no_parameters():
    q = torch.randn(2, 3, 7, 5)
    for scale_by_std in (True, False):
        router = QueryNormRouter(BUDGET, scale_by_std=scale_by_std)
        want = route_heads_by_query_norm(q, shared_heads=2, top_k=3, scale_by_std=scale_by_std)
        assert list(router.parameters()) == []
        assert all(map(torch.equal, router(q)[:4], want[:4]))
