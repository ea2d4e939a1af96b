"""route_heads, route_heads_by_query_norm, route_tokens: worked by hand, ties, edges, dtypes."""

import math

import pytest
import torch
from torch.testing import assert_close

from headwise.ops import (
    ExpertRouting,
    HeadRouting,
    Routing,
    route_heads,
    route_heads_by_query_norm,
    route_heads_by_scores,
    route_tokens,
)

SIZES = [(0, 5, 2), (1, 5, 3), (3, 5, 0), (3, 0, 0), (2, 1, 1), (2, 7, 7)]


def logs(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("shared", "routed", "stage", "top_k", "paper", "released"),
    [
        (logs(1, 1), logs(3, 1), logs(1, 1), 1, [1 / 4, 1 / 4, 3 / 8, 0], [1, 1, 1, 0]),
        (logs(5), logs(6, 1, 3), logs(3, 1), 2, [0.75, 0.15, 0, 0.075], [1.5, 2 / 3, 0, 1 / 3]),
        (logs(1, 3), logs(), None, 0, [1 / 4, 3 / 4], [1 / 2, 3 / 2]),
        (logs(), logs(1, 3), None, 1, [0, 3 / 4], [0, 1]),
        (logs(), logs(2, 3, 5), None, 2, [0, 0.3, 0.5], [0, 0.75, 1.25]),
    ],
)
def test_two_stage_gates_by_hand(shared, routed, stage, top_k, paper, released):
    for mode, gates in (("paper", paper), ("released", released)):
        routing = route_heads(shared, routed, stage, top_k=top_k, mode=mode)
        assert_close(routing.weights, torch.tensor([gates], dtype=torch.float64))


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize(("shared", "routed", "top_k"), SIZES)
def test_as_many_heads_are_on_as_the_budget_says(shared, routed, top_k, mode):
    stage = torch.randn(2, 11, 2)
    routing = route_heads(
        torch.randn(2, 11, shared), torch.randn(2, 11, routed), stage, top_k=top_k, mode=mode
    )
    assert ((routing.weights != 0).sum(-1) == shared + top_k).all()
    assert (routing.weights[..., :shared] > 0).all()
    assert routing.indices.shape == (2, 11, top_k)
    on = routing.weights[..., shared:].gather(-1, routing.indices)
    assert (on > 0).all()


def test_released_gates_of_a_group_sum_to_twice_its_stage_times_its_size():
    shared, routed, stage = torch.randn(11, 3), torch.randn(11, 7), torch.randn(11, 2)
    gates = route_heads(shared, routed, stage, top_k=5).weights
    a = stage.softmax(-1)
    assert_close(gates[:, :3].sum(-1), 2 * a[:, 0] * 3)
    assert_close(gates[:, 3:].sum(-1), 2 * a[:, 1] * 5)


def test_released_with_one_routed_head_kept_leaves_that_router_without_gradient():
    routed = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    gates = route_heads(torch.randn(11, 3), routed, torch.randn(11, 2), top_k=1).weights
    (gates * torch.randn(11, 10)).sum().backward()
    assert_close(routed.grad, torch.zeros_like(routed), atol=1e-15, rtol=0)


@pytest.mark.parametrize(("scale_by_std", "best"), [(True, 2**0.5), (False, 4.0)])
def test_query_norms_by_hand(scale_by_std, best):
    # Norms 9 (shared), 1 and 5: their unbiased std is 4/√2, so z differs by √2, or by 4 unscaled.
    q = torch.tensor([[[[9.0, 0.0], [0.0, 1.0], [3.0, 4.0]]]])
    routing = route_heads_by_query_norm(q, shared_heads=1, top_k=1, scale_by_std=scale_by_std)
    assert routing.weights.tolist() == [[[1.0, 0.0, 1.0]]]
    assert routing.indices.tolist() == [[[1]]]
    p = 1 / (1 + math.exp(-best))
    assert_close(routing.probabilities, torch.tensor([[[1 - p, p]]]))


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_query_norm_gradient_is_the_probabilities_gradient(scale_by_std):
    q = torch.randn(2, 5, 7, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 7, dtype=torch.float64)
    gate = route_heads_by_query_norm(q, shared_heads=2, top_k=3, scale_by_std=scale_by_std).weights
    (got,) = torch.autograd.grad((gate * upstream).sum(), q)
    z = q[..., 2:, :].norm(dim=-1)
    z = z / z.std(-1, keepdim=True) if scale_by_std else z
    (want,) = torch.autograd.grad((z.softmax(-1) * upstream[..., 2:]).sum(), q)
    assert_close(got, want)


def test_scores_by_hand():
    scores = torch.tensor([2.0, 1.0, 3.0]).log()
    routing = route_heads_by_scores(scores, shared_heads=1, top_k=2)
    assert routing.weights.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert routing.indices.tolist() == [2, 0]
    assert_close(routing.probabilities, torch.tensor([1 / 3, 1 / 6, 1 / 2]))
    named = route_heads_by_scores(scores, shared_heads=(0, 3), top_k=1)
    assert named.weights.tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]
    gain = torch.tensor([5.0, 2.0, 3.0, 0.5])
    gained = route_heads_by_scores(scores, shared_heads=1, top_k=2, gain=gain)
    assert gained.weights.tolist() == [5.0, 2.0, 0.0, 0.5]


def test_the_gradient_of_scores_is_straight_through():
    scores = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 9, dtype=torch.float64)
    gate = route_heads_by_scores(scores, shared_heads=2, top_k=3).weights
    assert set(gate.unique().tolist()) == {0.0, 1.0}
    (got,) = torch.autograd.grad((gate * upstream).sum(), scores)
    (want,) = torch.autograd.grad((scores.softmax(-1) * upstream[..., 2:]).sum(), scores)
    assert_close(got, want)


@pytest.mark.parametrize("shared_heads", [0, 2, 4, 5])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_query_norms_give_finite_values_and_gradients(shared_heads, value):
    q = torch.full((1, 2, 5, 3), value, requires_grad=True)
    top_k = min(2, 5 - shared_heads)
    routing = route_heads_by_query_norm(q, shared_heads=shared_heads, top_k=top_k)
    routed = routing.probabilities.shape[-1]
    assert_close(routing.probabilities, torch.full((1, 2, routed), 1 / max(routed, 1)))
    if routed:
        (routing.weights * torch.arange(5.0)).sum().backward()
        assert q.grad.isfinite().all()


def test_equal_query_norms_do_not_blow_the_gradient_up():
    q = torch.ones(1, 1, 5, 3, requires_grad=True)
    gate = route_heads_by_query_norm(q, shared_heads=1, top_k=2).weights
    (gate * torch.arange(5.0)).sum().backward()
    assert q.grad.abs().max() < 100


def test_a_rotation_of_the_queries_keeps_the_routing():
    q = torch.randn(2, 5, 7, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    before, after = (
        route_heads_by_query_norm(x, shared_heads=2, top_k=2) for x in (q, q @ rotation)
    )
    assert torch.equal(before.indices, after.indices)


def test_experts_by_hand():
    raw = route_tokens(logs(1, 2, 5), top_k=2, normalize=False)
    normalised = route_tokens(logs(1, 2, 5), top_k=2)
    assert raw.indices.tolist() == normalised.indices.tolist() == [[2, 1]]
    assert_close(raw.weights, torch.tensor([[5 / 8, 2 / 8]], dtype=torch.float64))
    assert_close(normalised.weights, torch.tensor([[5 / 7, 2 / 7]], dtype=torch.float64))


def test_experts_by_sigmoids_by_hand():
    raw = route_tokens(logs(1, 2, 5), top_k=2, normalize=False, scores="sigmoid")
    normalised = route_tokens(logs(1, 2, 5), top_k=2, scores="sigmoid")
    assert raw.indices.tolist() == normalised.indices.tolist() == [[2, 1]]
    assert_close(raw.weights, torch.tensor([[5 / 6, 2 / 3]], dtype=torch.float64))
    assert_close(normalised.weights, torch.tensor([[5 / 9, 4 / 9]], dtype=torch.float64))
    for routing in (raw, normalised):
        assert_close(
            routing.probabilities, torch.tensor([[1 / 4, 1 / 3, 5 / 12]], dtype=torch.float64)
        )


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_bias_changes_the_choice_and_nothing_else(scores, normalize):
    options = {"normalize": normalize, "scores": scores}
    logits = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    every = route_tokens(logits, top_k=5, normalize=False, scores=scores)
    bias = torch.tensor([-9.0, 9, 0, -9, 0])
    routing = route_tokens(logits, top_k=3, bias=bias, **options)
    assert (routing.indices.sort(-1).values == torch.tensor([1, 2, 4])).all()
    assert (routing.indices[:, 0] == 1).all()
    # The affinities of the chosen, from a routing that chose all of them without a bias.
    affinity = torch.zeros_like(logits).scatter(-1, every.indices, every.weights)
    want = affinity.gather(-1, routing.indices)
    want = want / want.sum(-1, keepdim=True) if normalize else want
    assert_close(routing.weights, want)
    assert_close(routing.probabilities, every.probabilities)
    upstream = torch.randn_like(want)
    gradients = [torch.autograd.grad((w * upstream).sum(), logits) for w in (routing.weights, want)]
    assert_close(*gradients)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_bias_may_choose_what_underflowed(scores):
    logits = torch.tensor([[0.0, -200.0, -201.0]], requires_grad=True)
    bias = torch.tensor([-9.0, 0, 0])
    routing = route_tokens(logits, top_k=2, scores=scores, bias=bias)
    assert_close(routing.weights, torch.tensor([[1.0, -1.0]]).sigmoid() + 0 * logits[:, :2])
    (routing.weights[0, 0] + routing.probabilities[0, 0]).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("scores", "logits", "paper", "released", "chosen"),
    [
        # Of 1.2, 0.2, 0.4 and -1 sparsemax leaves two, 0.9 and 0.1, though three may stay: no
        # third head is chosen, and the two are scaled to 3.
        (
            "sparsemax",
            torch.tensor([[1.2, 0.2, 0.4, -1.0]], dtype=torch.float64),
            [1 / 2, 0.45, 0, 0.05, 0], [1, 2.7, 0, 0.3, 0], [0, 2, -1],
        ),
        # 3/4, 1/5, 1/2 and 1/10; the first three sum to 29/20.
        (
            "sigmoid", logs(3, 1 / 4, 1, 1 / 9),
            [1 / 2, 3 / 8, 1 / 10, 1 / 4, 0], [1, 45 / 29, 12 / 29, 30 / 29, 0], [0, 2, 1],
        ),
    ],
)  # fmt: skip
def test_scores_of_routed_heads_by_hand(scores, logits, paper, released, chosen):
    for mode, gates in (("paper", paper), ("released", released)):
        routing = route_heads(logs(1), logits, logs(1, 1), top_k=3, mode=mode, scores=scores)
        assert_close(routing.weights, torch.tensor([gates], dtype=torch.float64))
        assert (routing.weights == 0).tolist() == [[gate == 0 for gate in gates]]
        assert_close(routing.probabilities.sum(-1), torch.ones(1, dtype=torch.float64))
        assert routing.indices.tolist() == [chosen]


@pytest.mark.parametrize("mode", ["paper", "released"])
@pytest.mark.parametrize("scores", ["softmax", "sparsemax", "sigmoid"])
def test_gradients_of_gates(scores, mode):
    inputs = [torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (2, 5, 2)]
    assert torch.autograd.gradcheck(
        lambda *x: route_heads(*x, top_k=3, mode=mode, scores=scores).weights, inputs
    )


def test_ties_go_to_the_lowest_index():
    equal = torch.zeros(3, 101)
    assert route_tokens(equal, top_k=7).indices.tolist() == [list(range(7))] * 3
    heads = route_heads(equal[:, :0], equal, None, top_k=7)
    assert heads.indices.tolist() == [list(range(7))] * 3
    norms = route_heads_by_query_norm(torch.ones(1, 3, 101, 2), shared_heads=0, top_k=7)
    assert norms.indices.tolist() == [[list(range(7))] * 3]
    scored = route_heads_by_scores(equal, shared_heads=2, top_k=7)
    assert scored.indices.tolist() == [list(range(7))] * 3
    partly = torch.tensor([[1.0, 2.0, 2.0, 3.0, 2.0]])
    assert route_tokens(partly, top_k=3).indices.tolist() == [[3, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_routing_is_float32_or_wider(dtype, autocast):
    want = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 3, 5, 7, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routings = [
            route_tokens(x, top_k=2),
            route_heads(x[..., :3], x, x[..., :2], top_k=2),
            route_heads_by_query_norm(x, shared_heads=2, top_k=2),
            route_heads_by_scores(x, shared_heads=2, top_k=2),
        ]
    for routing in routings:
        assert routing.weights.dtype == routing.probabilities.dtype == routing.logits.dtype == want


def test_mask_switches_padding_off():
    routing = route_tokens(torch.randn(2, 3, 5), top_k=2)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    masked = routing.with_mask(mask)
    assert (masked.indices[~mask] == -1).all()
    assert (masked.weights[~mask] == 0).all()
    assert torch.equal(masked.indices[mask], routing.indices[mask])
    assert torch.equal(masked.weights[mask], routing.weights[mask])
    assert routing.with_mask(None) is routing


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: route_heads(x, x, x[..., :2], top_k=6), r"top_k is 6.*0\.\.5"),
        (lambda x: route_heads(x, x, x[..., :2], top_k=-1), r"top_k is -1"),
        (lambda x: route_heads(x, x, x[..., :2], top_k=1, mode="soft"), "mode is 'soft'"),
        (lambda x: route_heads(x, x, None, top_k=1), "stage_logits is None"),
        (lambda x: route_heads(x, x, x[..., :2], top_k=1, scores="relu"), "scores is 'relu'"),
        (lambda x: route_heads_by_scores(x, shared_heads=2, top_k=6), r"top_k is 6.*0\.\.5"),
        (lambda x: route_heads_by_scores(x, shared_heads=[4, 3], top_k=1), r"shared_heads is \[4"),
        (lambda x: route_heads_by_scores(x, shared_heads=-1, top_k=1), "shared_heads is -1"),
        (
            lambda x: route_heads_by_scores(x, shared_heads=2, top_k=1, gain=x[0]),
            r"gain has shape \[5\]; it must be \[7\]",
        ),
        (lambda x: route_tokens(x, top_k=1, scores="sparsemax"), "scores is 'sparsemax'"),
        (lambda x: route_tokens(x, top_k=0), r"top_k is 0.*1\.\.5"),
        (lambda x: route_tokens(x, top_k=6), r"top_k is 6.*1\.\.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_field_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(3, 5))


def test_query_norm_errors():
    q = torch.randn(1, 2, 5, 3)
    for shared_heads, top_k, message in (
        (6, 1, "shared_heads is 6"),
        (-1, 1, "is -1"),
        (3, 3, "top_k is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            route_heads_by_query_norm(q, shared_heads=shared_heads, top_k=top_k)


def test_the_type_says_what_was_routed():
    heads = route_heads(torch.randn(2, 3), torch.randn(2, 5), torch.randn(2, 2), top_k=2)
    by_norm = route_heads_by_query_norm(torch.randn(2, 3, 5, 7), shared_heads=2, top_k=1)
    experts = route_tokens(torch.randn(2, 7), top_k=3)
    padding = torch.tensor([True, False])
    for routing, kind in ((heads, HeadRouting), (by_norm, HeadRouting), (experts, ExpertRouting)):
        assert type(routing) is kind
        assert isinstance(routing, Routing)
        masked = routing.with_mask(padding[:, None] if routing is by_norm else padding)
        assert type(masked) is kind
        assert (masked.indices[1] == -1).all()
        assert not masked.weights[1].any()
    assert heads.weights.shape[-1] == 8
    assert experts.weights.shape[-1] == 3
