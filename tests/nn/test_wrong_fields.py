"""Every field of every constructor and config, one at a time: what is wrong is a ValueError."""

import inspect
import math
from dataclasses import fields, is_dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise import MHMoE, MHMoEConfig, MoE, MoEConfig, MoHAttention, MoHConfig
from headwise.hf.conversion import Conversion
from headwise.models import DiTConfig, TransNeXtConfig
from headwise.nn import (
    CosineRouter,
    FittedExpertRouter,
    HeadBudget,
    LinearRouter,
    OneStageRouter,
    QueryNormRouter,
    TwoStageRouter,
)
from headwise.parity import Mixture, count_flops, match_mh_moe, match_sparse_moe

WRONG = (None, "x", -1, 0, 1.5, math.nan, math.inf, True, [], {}, 10**30, object())
EXPERTS = {"num_experts": 7, "top_k": 2, "expert_dim": 11}
BUDGET = HeadBudget(5, 2, 3)
SPARSE = {"dim": 96, "num_experts": 8, "top_k": 1, "expert_dim": 256, "heads": 2}
VALID = {
    MoHAttention: {"dim": 15, "num_heads": 5, "shared_heads": 2, "active_heads": 3},
    MHMoE: {"dim": 15, "num_heads": 3, **EXPERTS},
    MoE: {"dim": 15, **EXPERTS},
    LinearRouter: {"dim": 15, "num_experts": 7, "top_k": 2},
    CosineRouter: {"dim": 15, "num_experts": 7, "top_k": 2},
    FittedExpertRouter: {"dim": 15, "num_experts": 7, "top_k": 2},
    TwoStageRouter: {"dim": 15, "budget": BUDGET},
    OneStageRouter: {"dim": 15, "budget": BUDGET},
    QueryNormRouter: {"budget": BUDGET},
    HeadBudget: {"num_heads": 5, "shared_heads": 2, "active_heads": 3},
    HeadBudget.resolve: {"num_heads": 5, "shared": 2, "active": 3},
    MoHConfig: {},
    MoEConfig: EXPERTS,
    MHMoEConfig: {"num_heads": 3, **EXPERTS},
    Conversion: {"attention": MoHConfig()},
    TransNeXtConfig: {"shared_heads": (1, 1, 1, 1), "active_heads": (2, 2, 2, 2)},
    DiTConfig: {"shared_heads": 2, "active_heads": 4},
    Mixture: SPARSE,
    match_sparse_moe: SPARSE,
    match_mh_moe: SPARSE | {"num_experts": 40, "top_k": 2},
    count_flops: {"model": torch.nn.Linear(3, 5), "sequence_length": 7},
}
LAYERS = (MoHAttention, MHMoE, MoE)


def names_of(made):
    """The fields or arguments by name, not those of transformers' own configs."""
    if is_dataclass(made):
        ours = [base for base in made.__mro__ if base.__module__.startswith("headwise")]
        declared = {name for base in ours for name in inspect.get_annotations(base)}
        return [field.name for field in fields(made) if field.name in declared]
    parameters = inspect.signature(made).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "names"]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names += names_of(made.__base__)
    return list(dict.fromkeys(names))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("made", VALID, ids=lambda made: made.__qualname__)
def test_a_wrong_field_is_refused_or_works(made):
    made(**VALID[made])
    for name in names_of(made):
        refused = 0
        for wrong in WRONG:
            try:
                result = made(**VALID[made] | {name: wrong})
            except ValueError:
                refused += 1
            else:
                if made in LAYERS:
                    y, _ = result(torch.randn(2, 3, result.dim))
                    assert y.isfinite().all()
        assert refused >= 5, (name, refused)


def check_works(layer, batch, tokens):
    x = torch.randn(batch, tokens, layer.dim, requires_grad=True)
    y, routing = layer(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    (y.square().sum() + routing.probabilities.square().sum()).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


QUICK = settings(derandomize=True, deadline=None, max_examples=30, database=None)
SIZES = {"batch": st.integers(1, 3), "tokens": st.integers(1, 7)}


@QUICK
@given(st.data(), st.sampled_from(["two_stage", "one_stage", "query_norm"]), st.booleans())
def test_attention_of_any_size_works(data, router, causal):
    kv, group, width = (data.draw(st.integers(1, most)) for most in (3, 3, 5))
    heads = kv * group
    active = data.draw(st.integers(1, heads))
    shared = data.draw(st.integers(0, active if active == heads else active - 1))
    layer = MoHAttention(
        data.draw(st.integers(1, 17)), num_heads=heads, num_kv_heads=kv, head_dim=width,
        shared_heads=shared, active_heads=active, router=router, causal=causal,
    )  # fmt: skip
    check_works(layer, *(data.draw(size) for size in SIZES.values()))


@QUICK
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from(["linear", "cosine"]))
def test_experts_of_any_size_work(data, glu, normalize, router):
    heads, width, experts = (data.draw(st.integers(1, most)) for most in (3, 5, 7))
    layer = MHMoE(
        heads * width, num_heads=heads, num_experts=experts, glu=glu, router=router,
        top_k=data.draw(st.integers(1, experts)), expert_dim=data.draw(st.integers(1, 11)),
        normalize_top_k=normalize, shared_expert_dim=data.draw(st.sampled_from([None, 0, 3])),
    )  # fmt: skip
    check_works(layer, *(data.draw(size) for size in SIZES.values()))
