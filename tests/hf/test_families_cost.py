"""FLOPs and parameters of every family of models, by formula, against torch's counter."""

from functools import partial

import pytest
import torch
from conversions import EXPERTS, FAMILIES, MH_MOE, MOE, SIZES
from test_families import tiny, unlabelled

from headwise import MHMoEConfig, MoEConfig, MoHConfig, convert
from headwise.parity import count_flops, count_parameters, measure_flops

LAYERS, HEADS, WIDTH = SIZES["num_hidden_layers"], 6, 4
CAUSAL = set(FAMILIES) - {"BERT", "ViT"}
MIXTURES = {
    "moe": MOE,
    "moe, two matrices": MoEConfig(**EXPERTS, glu=False, shared_expert_dim=5),
    "mh_moe": MH_MOE,
    "mh_moe, cosine": MHMoEConfig(num_heads=3, **EXPERTS, router="cosine", bias=True),
}
WITH_AN_MLP = [family for family in FAMILIES if family != "BERT"]


def tokens(family):
    return 26 if family == "ViT" else 11  # 25 patches and the class token


def by_formula(model, family):
    return sum(count_flops(model, sequence_length=tokens(family)).values())


def measured(model, family):
    """FLOPs per token that torch's counter sees in a forward of whole sequences."""
    given = unlabelled(family)
    given.pop("attention_mask", None)
    with torch.no_grad():
        forward = measure_flops(lambda: model(**given))
        return (forward - angles_of_positions(model, family)) / (2 * tokens(family))


def angles_of_positions(model, family):
    """FLOPs for which older transformers get the angles of rotary embeddings by matrix products."""
    positions = torch.arange(tokens(family)).unsqueeze(0)
    rotary = [part for name, part in model.named_modules() if name.endswith("rotary_emb")]
    return sum(measure_flops(partial(part, torch.empty(1), positions)) for part in rotary)


def outside_the_window(family, heads):
    """FLOPs per token of pairs that Mistral's window of five tokens hides, which torch computes."""
    if family != "Mistral":
        return 0
    seen = 1 + 2 + 3 + 4 + 7 * 5
    return LAYERS * 4 * heads * WIDTH * (11 * 11 - seen) / 11


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_model_equals_torchs_counter(family):
    model = tiny(family)
    want = measured(model, family) - outside_the_window(family, HEADS)
    # ViT's class token is no patch, but counted as one.
    assert by_formula(model, family) == pytest.approx(want, rel=1e-3 if family == "ViT" else 1e-9)


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_routed_heads_equal_torchs_counter_less_the_heads_that_are_off(family, router):
    model = convert(
        tiny(family), attention=MoHConfig(router=router, shared=2, active=4, router_std=0.02)
    ).eval()
    length = tokens(family)
    pairs = (length + 1) / 2 if family in CAUSAL and family != "Mistral" else length
    off = LAYERS * 4 * (HEADS - 4) * WIDTH * pairs
    # The router multiplies by rows of zeros, up to 16: part of its speed, not of its work.
    zeros = LAYERS * 2 * SIZES["hidden_size"] * 8 if router == "two_stage" else 0
    want = measured(model, family) - off - zeros - outside_the_window(family, 4)
    assert by_formula(model, family) == pytest.approx(want, rel=1e-3 if family == "ViT" else 1e-9)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("family", WITH_AN_MLP)
def test_mixtures_of_experts_equal_torchs_counter(family, mixture):
    model = convert(tiny(family), mlp=MIXTURES[mixture], every=2).eval()
    want = measured(model, family) - outside_the_window(family, HEADS)
    assert by_formula(model, family) == pytest.approx(want, rel=1e-3 if family == "ViT" else 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pairs_are_counted_if_asked_for(family):
    model, length = tiny(family), tokens(family)
    every = count_flops(model, sequence_length=length, causal=False)
    seen = count_flops(model, sequence_length=length)
    attentions = [name for name in every if every[name] != seen[name]]
    assert len(attentions) == (LAYERS if family in CAUSAL else 0)
    assert all(every[name] == 4 * HEADS * WIDTH * length for name in attentions)


@pytest.mark.parametrize(
    ("mixture", "used", "size"), [("moe", 2, 3 * 24 * 11), ("mh_moe", 6, 3 * 8 * 11)]
)
@pytest.mark.parametrize("family", WITH_AN_MLP)
def test_a_token_uses_some_of_the_experts_parameters(family, mixture, used, size):
    model = convert(tiny(family), mlp=MIXTURES[mixture], every=3)
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total - (7 - used) * size)
