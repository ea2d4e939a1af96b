"""Both layers refuse the same inputs in the same words."""

import re

import pytest
import torch

from headwise import MHMoE, MoHAttention
from headwise.nn import (
    CosineRouter,
    FittedExpertRouter,
    HeadBudget,
    LinearRouter,
    OneStageRouter,
    QueryNormRouter,
    TwoStageRouter,
)

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
        (torch.zeros(1, 2, 7, 15), None, "x has shape [1, 2, 7, 15]"),
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


BUDGET = HeadBudget(5, 2, 3)
ROUTERS = {
    "linear": (LinearRouter(15, 7, top_k=2), torch.zeros(2, 7, 15)),
    "cosine": (CosineRouter(15, 7, top_k=2), torch.zeros(2, 7, 15)),
    "fitted": (FittedExpertRouter(15, 7, top_k=2), torch.zeros(2, 7, 15)),
    "two_stage": (TwoStageRouter(15, BUDGET), torch.zeros(2, 7, 15)),
    "one_stage": (OneStageRouter(15, BUDGET), torch.zeros(2, 7, 15)),
    "query_norm": (QueryNormRouter(BUDGET), torch.zeros(2, 7, 5, 3)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_refuse_what_they_cannot_read(name):
    router, x = ROUTERS[name]
    router(x, torch.ones(2, 7, dtype=torch.bool))
    field = "q" if name == "query_norm" else "x"
    narrow = x[:, :, 1:] if name == "query_norm" else x[..., 1:]
    for wrong, message in (
        (narrow, "has shape"),
        (x.long(), "is torch.int64; it must be floating"),
        (x.to(torch.complex64), "is torch.complex64; it must be floating"),
        (x.tolist(), "is a list; it must be a tensor"),
        (None, "is a NoneType; it must be a tensor"),
        *([] if name == "query_norm" else [(x.to("meta"), "is on meta; it must be on cpu")]),
    ):
        with pytest.raises(ValueError, match=f"^{field} {re.escape(message)}"):
            router(wrong)
    for mask in (torch.ones(2, 7), torch.ones(2, 5, dtype=torch.bool), [[True] * 7] * 2):
        with pytest.raises(ValueError, match=r"^mask is .*it must be .*\[2, 7\]"):
            router(x, mask)


@pytest.mark.usefixtures("unchecked")
def test_a_layer_refuses_what_lies_elsewhere_or_is_no_tensor(layer):
    for wrong, message in (
        (torch.zeros(2, 7, 15, device="meta"), "x is on meta; it must be on cpu"),
        (torch.zeros(2, 7, 15).to(torch.complex64), "x is torch.complex64"),
        (None, "x is a NoneType; it must be a tensor [B, T, 15]"),
        ("x", "x is a str"),
        (torch.tensor(1.0), "x has shape []; it must be [B, T, 15]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            layer(wrong)
    for mask in (1, torch.ones(2, 7, dtype=torch.bool, device="meta")):
        with pytest.raises(ValueError, match=r"^mask is "):
            layer(torch.zeros(2, 7, 15), mask)
