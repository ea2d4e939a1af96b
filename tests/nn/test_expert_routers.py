"""Routers of tokens: formulas, and balancing by biases instead of a loss."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from headwise import MHMoE, record_routing, update_biases
from headwise.nn import CosineRouter, FittedExpertRouter, LinearRouter
from headwise.ops import count_choices, load_and_probability, route_tokens

KINDS = pytest.mark.parametrize("kind", [LinearRouter, CosineRouter])


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


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_linear_is_route_tokens_of_a_product(scores):
    router, x = (
        LinearRouter(13, 7, top_k=3, normalize_top_k=False, scores=scores),
        torch.randn(5, 13),
    )
    want = route_tokens(x @ router.weight.T, top_k=3, normalize=False, scores=scores)
    assert_close(router(x)[:4], want[:4])


def test_fitted_by_hand():
    router = FittedExpertRouter(2, 3, top_k=2)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        router.bias.copy_(torch.tensor([0.0, 2.0, -9.0]))
        router.gain.copy_(torch.tensor([1.5, 0.5, 7.0]))
    routing = router(torch.tensor([[3.0, 4.0]]))
    assert_close(routing.logits, torch.tensor([[3.0, 6.0, -2.0]]))
    assert routing.indices.tolist() == [[1, 0]]
    assert routing.weights.tolist() == [[0.5, 1.5]]


def test_the_choice_of_a_fitted_router_learns_straight_through():
    router, x = FittedExpertRouter(13, 7, top_k=3), torch.randn(5, 13)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    routing, up = router(x), torch.randn(5, 3)
    gradient = torch.autograd.grad((routing.weights * up).sum(), router.weight, retain_graph=True)
    of_chosen = routing.probabilities.gather(-1, routing.indices)
    gain = router.gain.detach()[routing.indices]
    assert_close(gradient, torch.autograd.grad((of_chosen * gain * up).sum(), router.weight))


@KINDS
def test_biases_change_the_choice_only(kind):
    router, x = kind(13, 7, top_k=2, bias_rate=0.1), torch.randn(11, 13)
    plain = kind(13, 7, top_k=2)
    plain.load_state_dict(router.state_dict(), strict=False)
    assert torch.equal(router(x).indices, plain(x).indices)
    router.bias[5] = 9
    routing = router(x)
    assert (routing.indices[:, 0] == 5).all()
    assert torch.equal(routing.probabilities, plain(x).probabilities)
    want = routing.probabilities.gather(-1, routing.indices)
    assert_close(routing.weights, want / want.sum(-1, keepdim=True))


def routing_of(*choices):
    """Of one token each, to two of four experts; None is padding."""
    indices = torch.tensor([choice or (0, 1) for choice in choices])
    logits = torch.zeros(len(choices), 4).scatter(-1, indices, 1.0)
    mask = torch.tensor([choice is not None for choice in choices])
    return route_tokens(logits, top_k=2).with_mask(mask)


def test_an_update_by_hand():
    router = LinearRouter(3, 4, top_k=2, bias_rate=0.25)
    # Loads 3, 2, 1, 2 around a mean of 2; two tokens of padding do not count.
    routing = routing_of((0, 1), (0, 1), None, (0, 3), (2, 3), None)
    assert count_choices(routing).tolist() == [3, 2, 1, 2]
    update_biases(router, {"": routing})
    assert router.bias.tolist() == [-0.25, 0, 0.25, 0]
    update_biases(router, {"": routing_of((2, 3))})
    assert router.bias.tolist() == [0, 0.25, 0, -0.25]
    assert router.load.tolist() == [0, 0, 0, 0]


def test_a_router_to_which_nothing_came_is_left_alone():
    layer = MHMoE(15, num_heads=3, num_experts=4, top_k=2, expert_dim=7, bias_rate=0.5)
    update_biases(layer, {"router": routing_of(None, None)})
    update_biases(layer, {})
    assert layer.router.bias.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_skewed_stream_becomes_balanced(scores):
    router = LinearRouter(13, 7, top_k=2, scores=scores, bias_rate=0.003)
    with torch.no_grad():
        router.weight.normal_(std=0.3)
        router.weight[:, 0] = torch.tensor([1.2, 0.9, 0, 0, -0.3, -0.6, -1.2])
    x = torch.randn(499, 13)
    x[:, 0] = 1
    busiest = []
    for _ in range(1000):
        routing = router(x)
        busiest.append(load_and_probability(routing)[0].max().item())
        update_biases(router, {"": routing})
    # The mean share is 2/7.
    assert busiest[0] > 0.6
    assert max(busiest[-50:]) < 2 / 7 + 0.05


@KINDS
def test_without_a_rate_there_are_no_buffers(kind):
    assert list(kind(13, 7, top_k=2).buffers()) == []
    names = {name for name, _ in kind(13, 7, top_k=2, bias_rate=0.1).named_buffers()}
    assert names == {"bias", "load"}


def test_drawn_weights_are_the_same_with_and_without_a_rate():
    weights = []
    for rate in (0.0, 0.1):
        torch.manual_seed(1)
        layer = MHMoE(15, num_heads=3, num_experts=7, top_k=2, expert_dim=5, bias_rate=rate)
        weights.append(list(layer.parameters()))
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_biases_and_loads_stay_exact_in_a_model_of_any_dtype(dtype):
    layer = MHMoE(15, num_heads=3, num_experts=7, top_k=2, expert_dim=5, bias_rate=0.001)
    layer.router.bias.fill_(1.001)
    layer.router.load.fill_(257)
    again = copy.deepcopy(layer).to(dtype)
    assert again.router.weight.dtype == dtype
    assert torch.equal(again.router.bias, layer.router.bias)
    assert torch.equal(again.router.load, layer.router.load)
    assert again(torch.randn(1, 2, 15, dtype=dtype))[0].dtype == dtype
    empty = again.to("meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.router.bias, layer.router.bias)


def update_with_half(rank, layer, x, mask):
    """In one of two processes: both end with what one process with all tokens would have."""
    with record_routing(layer) as routings:
        layer(x, mask)
    loads = count_choices(routings["router"])
    want = 0.25 * (loads.mean() - loads).sign()
    with record_routing(layer) as routings:
        layer(x[[rank]], mask[[rank]])
    own = count_choices(routings["router"])
    assert not torch.equal((own.mean() - own).sign(), want / 0.25), "one half tells all"
    update_biases(layer, routings)
    assert torch.equal(layer.router.bias, want)


def test_two_processes_agree(two_processes):
    layer = MHMoE(15, num_heads=3, num_experts=7, top_k=2, expert_dim=5, bias_rate=0.25)
    torch.nn.init.normal_(layer.router.weight)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 4:] = False
    two_processes(update_with_half, layer, torch.randn(2, 11, 15), mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 8}, r"top_k is 8.*1\.\.7"),
        ({"scores": "sparsemax"}, "scores is 'sparsemax'"),
        ({"bias_rate": -0.1}, r"bias_rate is -0\.1"),
        ({"bias_rate": math.nan}, "bias_rate is nan"),
        ({"bias_rate": math.inf}, "bias_rate is inf"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_field_and_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        LinearRouter(13, **{"num_experts": 7, "top_k": 2} | options)
