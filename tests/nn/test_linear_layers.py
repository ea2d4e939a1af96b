"""A layer is computed by `ops.linear` where it is plain, and by itself where something else is."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

from headwise import MHMoE
from headwise.nn import linear as module


@pytest.fixture
def taken(monkeypatch):
    """How often `ops.linear` was asked."""
    calls = []

    def linear(*operands):
        calls.append(operands)
        return nn.functional.linear(*operands)

    monkeypatch.setattr(module, "linear", linear)
    return calls


def small_layer():
    torch.manual_seed(0)
    return MHMoE(12, num_heads=3, num_experts=5, top_k=2, expert_dim=8)


def test_head_and_merge_layer_are_asked_once_each(taken):
    layer = small_layer()
    layer(torch.randn(2, 4, 12))
    asked = [id(weight) for _, weight, _ in taken]
    assert asked == [id(layer.head_proj.weight), id(layer.merge_proj.weight)]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_run(taken, register):
    layer, seen = small_layer(), []
    getattr(layer.head_proj, register)(lambda *_: seen.append(1))
    x = torch.randn(2, 4, 12, requires_grad=True)
    layer(x)[0].sum().backward()
    assert seen == [1]
    assert len(taken) == 1


def test_reparametrised_weights_are_used(taken):
    layer = small_layer()
    x = torch.randn(2, 4, 12)
    before = layer(x)[0]
    taken.clear()
    parametrizations.weight_norm(layer.head_proj)
    assert_close(layer(x)[0], before)
    assert len(taken) == 1


# torch itself warns of what it will take away.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_finds_them():
    layer = small_layer().eval()
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.head_proj) is not nn.Linear
    x = torch.randn(2, 4, 12)
    assert_close(quantised(x)[0], layer(x)[0], rtol=0.2, atol=0.2)
