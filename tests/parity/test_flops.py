"""FLOPs by formula against torch's counter and by hand; what has no formula is refused."""

from functools import partial

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    PreTrainedModel,
)

import tiny
from headwise import (
    MHMoE,
    MHMoEConfig,
    MoEConfig,
    MoHAttention,
    MoHConfig,
    convert,
    fit,
    fit_experts,
)
from headwise.models import DecoderConfig, DecoderForCausalLM
from headwise.parity import count_flops, count_parameters, measure_flops, router_share

B, T = 2, 48
EXPERTS = {"num_experts": 5, "top_k": 2, "expert_dim": 56}


llama = partial(tiny.llama, vocab_size=97, hidden_size=48, intermediate_size=112)


def measured(model: PreTrainedModel) -> float:
    """FLOPs per token that torch's counter sees in a forward."""
    ids = torch.randint(0, 97, (B, T))
    positions = torch.arange(T)[None]
    with torch.no_grad():
        # Older transformers get the angles of rotary embeddings by a product of matrices.
        angles = measure_flops(lambda: model.model.rotary_emb(torch.empty(1), positions))
        return (measure_flops(lambda: model(ids)) - angles) / (B * T)


def by_formula(model: torch.nn.Module) -> float:
    return sum(count_flops(model, sequence_length=T).values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"head_dim": 20}],
    ids=["plain", "grouped keys", "tied", "wide heads"],
)
def test_dense_model_equals_torchs_counter(changes):
    model = llama(**changes)
    assert by_formula(model) == pytest.approx(measured(model), rel=1e-6)


@pytest.mark.parametrize(
    "mlp",
    [
        MoEConfig(**EXPERTS),
        MoEConfig(**EXPERTS, glu=False, router="cosine"),
        MHMoEConfig(num_heads=3, **EXPERTS),
        MHMoEConfig(num_heads=3, **EXPERTS, shared_expert_dim=40),
        MHMoEConfig(num_heads=3, **EXPERTS, router="cosine", bias=True),
        MHMoEConfig(num_heads=2, **EXPERTS, head_layer=False, glu=False, merge_layer=False),
    ],
    ids=["moe", "moe cosine", "mh_moe", "mh_moe shared", "mh_moe cosine", "mh_moe bare"],
)
def test_mixture_of_experts_equals_torchs_counter(mlp):
    model = convert(llama(num_key_value_heads=3), mlp=mlp, every=2).eval()
    assert by_formula(model) == pytest.approx(measured(model), rel=0.01)


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
def test_moh_equals_torchs_counter_less_the_heads_that_are_off(router):
    attention = MoHConfig(router=router, shared=2, active=4, router_std=0.02)
    model = convert(llama(num_key_value_heads=2), attention=attention).eval()
    a_head = 4 * 8 * (T + 1) / 2  # scores and sum, 8 channels, (T + 1) / 2 keys on average
    off = 2 * 2 * a_head  # layers times heads that are off
    # The router multiplies by rows of zeros, up to 16: part of its speed, not of its work.
    zeros = 2 * 2 * model.config.hidden_size * 8 if router == "two_stage" else 0
    assert by_formula(model) == pytest.approx(measured(model) - off - zeros, rel=1e-3)


def test_what_is_fitted_equals_torchs_counter_less_the_heads_that_are_off():
    model = llama(num_hidden_layers=3).eval()
    batches = [{"input_ids": x, "labels": x} for x in torch.randint(97, (4, 4, T))]
    experts = MoEConfig(
        num_experts=5, top_k=2, expert_dim=16, shared_expert_dim=32, router="fitted",
        experts_from="mlp",
    )  # fmt: skip
    heads = fit(model, batches, MoHConfig(router="fitted", active=[6, 4, 4]), allocate="alike")
    convert(model, attention=heads, mlp=fit_experts(model, batches, experts))
    off = 2 * 2 * 4 * 8 * (T + 1) / 2
    assert by_formula(model) == pytest.approx(measured(model) - off, rel=0.01)


@pytest.mark.parametrize(
    ("layer_is", "count", "keys"), [(True, True, 3), (True, False, 5), (False, True, 5)]
)
def test_moh_layer_by_hand(layer_is, count, keys):
    heads = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 10}
    layer = MoHAttention(48, **heads, shared_heads=2, active_heads=4, causal=layer_is)
    flops = count_flops(layer, sequence_length=5, causal=count)
    assert flops == {
        "": 4 * 4 * 10 * keys,  # four heads that are on
        "q_proj": 2 * 48 * 60, "k_proj": 2 * 48 * 20, "v_proj": 2 * 48 * 20, "o_proj": 2 * 48 * 60,
        "router.shared": 2 * 48 * 2, "router.routed": 2 * 48 * 4, "router.stage": 2 * 48 * 2,
    }  # fmt: skip


def test_moh_layer_with_heads_of_different_widths_by_hand():
    layer = MoHAttention(
        48, num_heads=5, shared_heads=2, active_heads=4, head_dims=(3, 7, 11, 5, 2), causal=True
    )
    flops = count_flops(layer, sequence_length=5)
    # Two shared heads of 3 and 7 channels, and two of three that have 11, 5 and 2; 3 keys.
    assert flops[""] == 4 * (3 + 7 + 2 / 3 * (11 + 5 + 2)) * 3
    of_28 = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name for name in flops if flops[name] == 2 * 48 * 28} == of_28
    always_on = MoHAttention(48, num_heads=2, shared_heads=2, active_heads=2, head_dims=(3, 7))
    assert count_flops(always_on, sequence_length=5, causal=False)[""] == 4 * 10 * 5
    biases = 3 * 28 + 48
    assert count_parameters(layer) == (4 * 48 * 28 + biases + 48 * (2 + 3 + 2),) * 2


@pytest.mark.parametrize("heads", [{}, {"shared_heads": 4, "active_heads": 4, "router_std": 0.0}])
@pytest.mark.parametrize("head_dims", [(12,) * 4, (16, 8, 16, 8)])
def test_decoder_of_any_widths_equals_torchs_counter(head_dims, heads):
    model = DecoderForCausalLM(
        DecoderConfig(
            vocab_size=97, hidden_size=48, intermediate_size=112, head_dims=head_dims, rotary_dim=8,
            num_hidden_layers=2, **heads,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 97, (B, T))
    with torch.no_grad():
        counted = measure_flops(lambda: model(ids)) / (B * T)
    # Of the router, one map of four scores: it multiplies by rows of zeros, up to 16.
    zeros = 2 * 2 * 48 * 12 if heads else 0
    assert by_formula(model) == pytest.approx(counted - zeros, rel=1e-6)


def test_moh_layer_with_routed_groups_by_hand():
    layer = MoHAttention(
        48, num_heads=6, num_kv_heads=3, shared_heads=2, active_heads=4, route_groups=True,
        causal=True,
    )  # fmt: skip
    flops = count_flops(layer, sequence_length=5)
    assert flops[""] == 4 * 4 * 8 * 3  # four heads that are on
    assert (flops["router.routed"], flops["router.stage"]) == (2 * 48 * 2, 2 * 48 * 2)
    assert "router.shared" not in flops  # one shared group: no choice


def test_mh_moe_layer_by_hand():
    layer = MHMoE(12, num_heads=3, num_experts=7, top_k=2, expert_dim=5, shared_expert_dim=11)
    assert count_flops(layer, sequence_length=1) == {
        "head_proj": 2 * 12 * 12,
        "merge_proj": 2 * 12 * 12,
        "router": 3 * 2 * 4 * 7,  # three sub-tokens of width 4, seven experts
        "experts": 3 * 2 * 2 * 3 * 4 * 5,  # three sub-tokens, two experts, three matrices
        "shared_expert": 2 * 3 * 12 * 11,
    }


def test_a_head_of_classes_runs_once_a_sequence_or_for_every_token():
    config = BertConfig(**tiny.SIZES, num_labels=7)
    once = count_flops(BertForSequenceClassification(config), sequence_length=11)
    assert once["bert.pooler.dense"] == pytest.approx(2 * 24 * 24 / 11)
    assert once["classifier"] == pytest.approx(2 * 24 * 7 / 11)
    every = count_flops(BertForTokenClassification(config), sequence_length=11)
    assert every["classifier"] == 2 * 24 * 7


def test_sequence_length_is_checked():
    message = "sequence_length is 0; it must be an int of at least 1 or None"
    with pytest.raises(ValueError, match=message):
        count_flops(torch.nn.Linear(2, 3), sequence_length=0)


def of_kind(name: str, **fields: object) -> torch.nn.Module:
    """A module of a class of that name, as transformers would bring it."""
    module = type(name, (torch.nn.Module,), {})()
    for field, value in fields.items():
        setattr(module, field, value)
    return module


WINDOW = {"head_dim": 4, "num_heads": 2, "is_causal": False, "sliding_window": 5}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (torch.nn.MultiheadAttention(6, 2), r"MultiheadAttention with weights in_proj_weight \[18"),
        (torch.nn.Conv2d(3, 5, 3, padding=1), r"Conv2d with weights weight \[5, 3, 3, 3\]"),
        (of_kind("LatentAttention", is_causal=True), "does not say how wide its heads are"),
        (of_kind("NewAttention", head_dim=4), "does not say how many heads it has"),
        (of_kind("LocalAttention", **WINDOW), "a window of 5 that is not causal"),
        (of_kind("Decoder", config=GPT2Config(add_cross_attention=True)), "has cross attention"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_what_has_no_formula_is_refused_by_name(module, message):
    place = torch.nn.ModuleDict({"part": module}) if "cross" not in message else module
    with pytest.raises(ValueError, match=message) as refused:
        count_flops(place, sequence_length=7)
    assert str(refused.value).startswith("part is a" if place is not module else "Decoder has")


def test_a_window_longer_than_the_sequence_is_none():
    local = of_kind("LocalAttention", **WINDOW)
    assert count_flops(local, sequence_length=5) == {"": 4 * 2 * 4 * 5}


def test_share_of_the_routers_by_hand():
    """Two layers of 6 heads of 8 channels: routers are linear maps of 48 columns."""
    attention = MoHConfig(shared=2, active=4, router="two_stage")
    mlp = MoEConfig(**EXPERTS)
    mh_moe = MHMoEConfig(num_heads=3, **EXPERTS)
    heads = 2 * 48 * (2 + 4 + 2)  # scores of shared heads, of routed heads, of the two stages
    for changes, spent in (
        ({}, 0),
        ({"attention": attention}, 2 * heads),
        ({"mlp": mlp}, 2 * 2 * 48 * 5),
        ({"mlp": mh_moe}, 2 * 3 * 2 * 16 * 5),  # three sub-tokens of 16 columns
        ({"attention": attention, "mlp": mlp}, 2 * heads + 2 * 2 * 48 * 5),
        ({"attention": MoHConfig(shared=2, active=4, router="query_norm")}, 0),
    ):
        model = convert(llama(), **changes) if changes else llama()
        flops = count_flops(model, sequence_length=T)
        assert router_share(model, flops) == pytest.approx(spent / sum(flops.values()))


def test_a_router_by_itself():
    for name, module in convert(llama(), attention=MoHConfig(router="two_stage")).named_modules():
        if name.endswith("router"):
            assert router_share(module, count_flops(module, sequence_length=T)) == 1
