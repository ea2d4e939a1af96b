"""Both layers refuse the same inputs in the same words."""

import re

import pytest
import torch

from headwise import MHMoE, MoHAttention

LAYERS = {
    "moh": MoHAttention(15, num_heads=5, shared_heads=2, active_heads=3),
    "mh_moe": MHMoE(15, num_heads=3, num_experts=7, top_k=2, expert_dim=11),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 7, 13), None, "x has shape [2, 7, 13]; it must be [B, T, 15]"),
        (torch.zeros(7, 15), None, "x has shape [7, 15]"),
        (torch.zeros(2, 7, 15).bfloat16(), None, "x is torch.bfloat16, the layer's weights are"),
        (torch.zeros(2, 7, 15).long(), None, "x is torch.int64"),
        (torch.zeros(2, 7, 15), torch.ones(2, 7), "mask is torch.float32 [2, 7]"),
        (torch.zeros(2, 7, 15), torch.ones(2, 5, dtype=torch.bool), "must be torch.bool [2, 7]"),
    ],
)
def test_wrong_inputs_are_named(layer, x, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(x, mask)


def test_autocast_takes_another_float(layer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(torch.randn(2, 7, 15).bfloat16())
    assert y.isfinite().all()
