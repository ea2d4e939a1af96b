"""balance_loss in its three forms, of one process and of two, and router_z_loss."""

import math

import pytest
import torch
from torch import distributed
from torch.testing import assert_close

from headwise.ops import (
    balance_loss,
    load_and_probability,
    route_heads,
    route_tokens,
    router_z_loss,
)

# F = [1/2, 1, 1/2] (first choices: [1/2, 1/2, 0]), P = [.3, .45, .25]; of the first token alone
# F = [1, 1, 0] (first choice: [1, 0, 0]), P = [.5, .3, .2].
PROBABILITIES = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("form", "both", "first"),
    [("scaled", 2.175, 2.4), ("plain", 0.725, 0.8), ("first_choice", 1.125, 1.5)],
)
def test_balance_by_hand(form, both, first):
    routing = route_tokens(PROBABILITIES.log(), top_k=2)
    masked = routing.with_mask(torch.tensor([[True, False]]))
    assert balance_loss(routing, form=form).item() == pytest.approx(both)
    assert balance_loss(masked, form=form).item() == pytest.approx(first)


@pytest.mark.parametrize(
    ("form", "balanced"), [("scaled", 3), ("plain", 3 / 7), ("first_choice", 1)]
)
def test_value_at_balance(form, balanced):
    # Seven tokens whose best three of seven experts go round.
    logits = torch.stack([torch.tensor([3.0, 2, 1, 0, 0, 0, 0]).roll(i) for i in range(7)])
    assert balance_loss(route_tokens(logits, top_k=3), form=form).item() == pytest.approx(balanced)


def test_value_at_collapse_is_the_number_of_experts():
    logits = torch.tensor([100.0, 0, 0, 0, 0]).expand(11, 5)
    assert balance_loss(route_tokens(logits, top_k=1)).item() == pytest.approx(5)


def test_padding_counts_as_if_it_were_not_there():
    logits = torch.randn(2, 7, 5)
    mask = torch.rand(2, 7) > 0.4
    masked, cut = route_tokens(logits, top_k=2).with_mask(mask), route_tokens(logits[mask], top_k=2)
    for form in ("scaled", "plain", "first_choice"):
        assert_close(balance_loss(masked, form=form), balance_loss(cut, form=form))
    assert_close(router_z_loss(masked), router_z_loss(cut))


def test_nothing_but_padding_gives_zero():
    routing = route_tokens(torch.randn(2, 3, 5), top_k=2).with_mask(torch.zeros(2, 3, dtype=bool))
    assert balance_loss(routing) == router_z_loss(routing) == 0


def test_the_gradient_flows_through_the_mean_probability_only():
    logits = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    routing = route_tokens(logits, top_k=2)
    (got,) = torch.autograd.grad(balance_loss(routing), logits, retain_graph=True)
    share, _ = load_and_probability(routing)
    (want,) = torch.autograd.grad(5 * (share * routing.probabilities.mean(0)).sum(), logits)
    assert not share.requires_grad
    assert_close(got, want)


def test_sparsemax_counts_the_heads_that_are_on():
    logits = torch.tensor([[3.0, 0.0, 0.0], [0.1, 0.0, -5.0]])
    routing = route_heads(logits[:, :0], logits, None, top_k=2, scores="sparsemax")
    share, _ = load_and_probability(routing)
    assert_close(share, torch.tensor([1.0, 0.5, 0.0]))


def balance_half_of_the_batch(rank, logits):
    """In one of two processes: the gradients' average is that of the loss on both halves."""
    for form in ("scaled", "plain", "first_choice"):
        for mask in (None, torch.tensor([[True, True, False], [False, True, True]])):
            joined, mine = (logits.clone().requires_grad_() for _ in range(2))
            both = route_tokens(joined, top_k=2).with_mask(mask)
            (want,) = torch.autograd.grad(balance_loss(both, form=form), joined)
            half = route_tokens(mine[[rank]], top_k=2)
            half = half.with_mask(None if mask is None else mask[[rank]])
            for scope in ("all", "process"):
                (got,) = torch.autograd.grad(
                    balance_loss(half, form=form, scope=scope), mine, retain_graph=True
                )
                distributed.all_reduce(got)
                assert torch.allclose(got / 2, want) == (scope == "all"), (form, mask, scope)


def test_two_processes_balance_the_joined_batch(two_processes):
    two_processes(balance_half_of_the_batch, torch.randn(2, 3, 5, dtype=torch.float64))


def test_one_process_is_all():
    routing = route_tokens(torch.randn(2, 3, 5), top_k=2)
    assert torch.equal(balance_loss(routing, scope="all"), balance_loss(routing))


def test_a_layer_that_routes_nothing_has_no_balance_loss():
    routing = route_heads(torch.randn(2, 3, 4), torch.randn(2, 3, 0), None, top_k=0)
    assert balance_loss(routing) == 0


def test_a_layer_that_routes_nothing_has_no_z_loss():
    routing = route_heads(torch.randn(2, 3, 4), torch.randn(2, 3, 0), None, top_k=0)
    assert router_z_loss(routing) == 0


def test_z_loss_by_hand():
    routing = route_tokens(torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]]), top_k=1)
    masked = routing.with_mask(torch.tensor([[True, False]]))
    ln2, ln4 = math.log(2), math.log(4)
    assert router_z_loss(routing).item() == pytest.approx((ln2**2 + ln4**2) / 2)
    assert router_z_loss(masked).item() == pytest.approx(ln2**2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["form", "scope"])
def test_unknown_form_or_scope(field):
    with pytest.raises(ValueError, match=f"{field} is 'mean'"):
        balance_loss(route_tokens(torch.randn(3, 5), top_k=2), **{field: "mean"})
