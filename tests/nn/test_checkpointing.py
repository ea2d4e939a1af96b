"""Layers under torch's activation checkpointing: no loss of a routing that trains nothing."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from headwise import MHMoE, MoHAttention, balance_loss, record_routing, router_z_loss

HEADS = {"num_heads": 5, "shared_heads": 1, "active_heads": 3}
LAYERS = {
    "two_stage": lambda: MoHAttention(15, router="two_stage", **HEADS),
    "query_norm": lambda: MoHAttention(15, router="query_norm", **HEADS),
    "mh_moe": lambda: MHMoE(15, num_heads=3, num_experts=7, top_k=2, expert_dim=11),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def x():
    return torch.randn(2, 7, 15, requires_grad=True)


class Block(nn.Module):
    """The layer's input is made inside the checkpointed function, too."""

    def __init__(self, layer):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(15), layer

    def forward(self, x):
        y, routing = self.layer(self.norm(x))
        return x + y, routing


def gradients(layer, loss):
    layer.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", [balance_loss, router_z_loss])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_routing_out_of_the_reentrant_kind_has_no_loss(layer, x, loss, wrapped):
    module = Block(layer) if wrapped else layer
    y, routing = checkpoint(module, x, use_reentrant=True)
    with pytest.raises(ValueError, match=r"reentrant.*use_reentrant=False"):
        loss(routing)
    y.sum().backward()
    with record_routing(module) as routings:
        checkpoint(module, x, use_reentrant=True)
    with pytest.raises(ValueError, match=r"reentrant.*use_reentrant=False"):
        loss(next(iter(routings.values())))
    with torch.no_grad():
        assert loss(routing).isfinite(), "as a measure it is as good as any"


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_keeps_the_gradients_has_a_loss(layer, x, reentrant):
    """The other kind does; so does a loss that the checkpointed function returns."""

    def loss_of(x):
        y, routing = layer(x)
        return y.square().mean() + balance_loss(routing)

    want = gradients(layer, loss_of(x))
    if reentrant:
        got = gradients(layer, checkpoint(loss_of, x, use_reentrant=True))
    else:
        y, routing = checkpoint(layer, x, use_reentrant=False)
        got = gradients(layer, y.square().mean() + balance_loss(routing))
    assert_close(got, want)


def test_without_gradients_a_routing_is_measured(layer, x):
    with torch.no_grad():
        _, routing = layer(x)
    assert balance_loss(routing).isfinite()
