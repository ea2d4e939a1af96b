"""The C++ kernels of routing: built here, then compared with float64."""

import pytest
import torch
from torch.testing import assert_close

from headwise.ops import route_heads, route_heads_by_query_norm, route_heads_by_scores
from headwise.ops.native import routing as native

pytestmark = pytest.mark.usefixtures("native_kernels")
# Shared heads, routed ones, and those of them that are kept.
SIZES = [(0, 5, 2), (1, 5, 3), (3, 5, 0), (3, 0, 0), (2, 1, 1), (2, 7, 7), (9, 64, 33)]


def case(shared, routed, batch=(3, 101), spread=3.0):
    """Logits that are parts of one wide product, as a router has them."""
    scores = spread * torch.randn(*batch, shared + routed + 2)
    return [part.detach() for part in scores.split([shared, routed, 2], dim=-1)]


def value_and_gradients(logits, upstream, dtype, **options):
    """Gates, chosen heads, probabilities, and gradients of the logits from the first and last."""
    leaves = [x.to(dtype).requires_grad_() for x in logits]
    routing = route_heads(*leaves, **options)
    outputs = routing.weights, routing.probabilities
    total = sum((x * up.to(dtype)).sum() for x, up in zip(outputs, upstream, strict=True))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    zeros = [
        torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)
    ]
    return [*outputs, *zeros], routing.indices


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize(("shared", "routed", "top_k"), SIZES)
def test_equals_float64(shared, routed, top_k, mode):
    logits = case(shared, routed)
    upstream = torch.randn(3, 101, shared + routed), torch.randn(3, 101, routed)
    options = {"top_k": top_k, "mode": mode}
    assert native.has_kernel(logits[1])
    got, chosen = value_and_gradients(logits, upstream, torch.float32, **options)
    want, expected = value_and_gradients(logits, upstream, torch.float64, **options)
    assert torch.equal(chosen, expected)
    for a, b in zip(got, want, strict=True):
        assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[0] != 0, want[0] != 0)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 0, 3), (1000,)])
def test_any_number_of_tokens(batch):
    shared, routed, stage = case(2, 5, batch)
    routing = route_heads(shared, routed, stage, top_k=3)
    want = route_heads(shared.double(), routed.double(), stage.double(), top_k=3)
    assert routing.weights.shape == (*batch, 7)
    assert_close(routing.weights.double(), want.weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(routing.indices, want.indices)


def test_ties_go_to_the_lowest_index():
    shared, routed, stage = case(2, 9)
    routing = route_heads(shared, torch.zeros_like(routed), stage, top_k=4)
    assert (routing.indices == torch.arange(4)).all()


def test_far_apart_logits_give_finite_gates():
    shared, routed, stage = case(2, 9, spread=1e4)
    routing = route_heads(shared, routed, stage, top_k=4)
    assert routing.weights.isfinite().all()
    assert_close(routing.probabilities.sum(-1), torch.ones(3, 101))


def test_registered_as_an_operator():
    shared, routed, stage = (x.flatten(0, 1).requires_grad_() for x in case(2, 5))
    torch.library.opcheck(
        torch.ops.headwise.native_route_heads.default, (shared, routed, stage, 3, False)
    )


def assert_same_routing(got, want):
    """Of the fields of a routing in order, and a routing."""
    assert torch.equal(got[0], want.weights.float())
    assert torch.equal(got[1], want.indices)
    for a, b in zip(got[2:4], want[2:4], strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize(
    ("heads", "shared", "top_k"),
    [(9, [0, 1], 4), (5, [1, 4], 2), (4, [], 1), (3, [0, 1], 1), (2, [0], 0), (62, [61], 30)],
)
def test_queries_route_as_in_float64(heads, shared, top_k, scale_by_std, dtype):
    q = torch.randn(2, 150, heads, 23).to(dtype)
    options = {"shared_heads": shared, "top_k": top_k, "scale_by_std": scale_by_std}
    assert native.has_kernel_for_queries(q)
    with torch.no_grad():
        got = route_heads_by_query_norm(q, **options)
    assert_same_routing(got, route_heads_by_query_norm(q.double(), **options))


@pytest.mark.parametrize("with_gain", [True, False])
@pytest.mark.parametrize(
    ("heads", "shared", "top_k"),
    [(9, [0, 1], 4), (5, [1, 4], 2), (4, [], 4), (3, [0, 1, 2], 0), (2, [0], 0), (62, [61], 30)],
)
def test_scores_route_as_in_float64(heads, shared, top_k, with_gain):
    # Of longer rows, as a router's product may have them.
    scores = torch.randn(2, 150, heads + 3)[..., : heads - len(shared)]
    gain = torch.randn(heads) if with_gain else None
    options = {"shared_heads": shared, "top_k": top_k}
    want = route_heads_by_scores(
        scores.double(), gain=None if gain is None else gain.double(), **options
    )
    with torch.no_grad():
        got = route_heads_by_scores(scores, gain=gain, **options)
        fields = native.routing_by_scores(scores, gain, shared, top_k)
    assert_same_routing((*fields, scores), want)
    assert_same_routing(got, want)


def test_scores_of_any_number_of_tokens_and_ties():
    for batch in ((), (0,), (1000,), (2, 0, 3)):
        gates, indices, _ = native.routing_by_scores(torch.zeros(*batch, 5), None, [2], 3)
        assert gates.shape == (*batch, 6)
        assert (indices == torch.arange(3)).all()
        assert (gates == torch.tensor([1.0, 1, 1, 1, 0, 0])).all()


def test_scores_that_are_no_numbers_choose_heads_that_exist():
    gates, indices, _ = native.routing_by_scores(torch.full((4, 5), torch.nan), None, [0], 2)
    assert (gates.sum(-1) == 3).all()
    assert ((indices >= 0) & (indices < 5)).all()


def test_queries_of_any_strides():
    q = torch.randn(2, 5, 11, 24).transpose(1, 2)
    views = q, q[..., ::2], torch.stack([q, q], dim=-1).unbind(-1)[0], q[..., :0]
    for view in views:
        got = native.query_norm_routing(view, [0], 2, True)
        assert_same_routing(got, route_heads_by_query_norm(view.double(), shared_heads=1, top_k=2))


@pytest.mark.parametrize("size", [(0, 3), (2, 0)])
def test_no_queries_route_nowhere(size):
    gates, indices, *_ = native.query_norm_routing(torch.ones(*size, 5, 8), [0], 2, True)
    assert gates.shape == (*size, 5)
    assert indices.shape == (*size, 2)


def test_equal_norms_count_as_no_deviation_and_the_first_win():
    _, indices, probabilities, logits = native.query_norm_routing(
        torch.full((1, 3, 6, 16), 0.3), [0], 2, True
    )
    assert (indices == torch.tensor([0, 1])).all()
    assert_close(probabilities, torch.full_like(probabilities, 0.2))
    assert_close(logits, torch.full_like(logits, 1.2))


def test_queries_that_are_no_numbers_choose_heads_that_exist():
    gates, indices, *_ = native.query_norm_routing(
        torch.full((1, 3, 6, 8), torch.nan), [0], 2, True
    )
    assert (gates.sum(-1) == 3).all()
    assert ((indices >= 0) & (indices < 5)).all()
