"""How models start: what is added to the residual stream is scaled by depth, nothing else is."""

import dataclasses

import pytest
import torch

from headwise.recipes.decoders import TextRun, build_model
from headwise.recipes.lm import LanguageModelRun
from headwise.recipes.scales import tiny
from headwise.recipes.studies import mh_moe
from headwise.training.comparison import Variant

SIZES = {"dim": 24, "num_heads": 4, "num_layers": 3, "mlp_dim": 40, "vocab_size": 300, "every": 2}
RUN = LanguageModelRun(**SIZES)
VARIANTS = {variant.name: variant for variant in RUN.variants()}
WITHOUT_MERGE = Variant(name="bare", label="", mlp=mh_moe(RUN, heads=2, top_k=2, merge_layer=False))
SHARED = Variant(name="shared", label="", mlp=mh_moe(RUN, heads=2, top_k=2, shared_expert_dim=7))


def scaled(variant: Variant, scale: float | None = None, run: TextRun = RUN) -> dict[str, float]:
    """By which factor weights differ from those of the same model without the scaling."""
    ours, plain = (
        dict(build_model(r, variant, vocab_size=300, seed=0).named_parameters())
        for r in (dataclasses.replace(run, residual_scale=x) for x in (scale, 1.0))
    )
    assert ours.keys() == plain.keys()
    factors = {}
    for name, weight in ours.items():
        if not torch.equal(weight, plain[name]):
            (factors[name],) = (weight / plain[name]).unique().double().round(decimals=5).unique()
    return {name.removeprefix("model.layers."): x.item() for name, x in factors.items()}


@pytest.mark.parametrize(
    ("variant", "of_experts"),
    [
        (VARIANTS["dense"], ["1.mlp.down_proj.weight"]),
        (VARIANTS["moh"], ["1.mlp.down_proj.weight"]),
        (VARIANTS["moe"], ["1.mlp.layer.experts.down_proj"]),
        (VARIANTS["mh_moe"], ["1.mlp.layer.merge_proj.weight"]),
        (dataclasses.replace(VARIANTS["mh_moe"], ternary=True), ["1.mlp.layer.merge_proj.weight"]),
        (WITHOUT_MERGE, ["1.mlp.layer.experts.down_proj"]),
        (
            SHARED,
            ["1.mlp.layer.merge_proj.weight", "1.mlp.layer.shared_expert.down_proj"],
        ),
    ],
    ids=["dense", "moh", "moe", "mh_moe", "ternary", "without merge layer", "shared expert"],
)
def test_the_last_map_of_each_branch_is_scaled_and_nothing_else(variant, of_experts):
    dense = [f"{layer}.mlp.down_proj.weight" for layer in (0, 2)]
    attention = [f"{layer}.self_attn.o_proj.weight" for layer in range(3)]
    factors = scaled(variant)
    assert sorted(factors) == sorted([*attention, *dense, *of_experts])
    assert set(factors.values()) == {round(6**-0.5, 5)}


@pytest.mark.parametrize("attention", [None, VARIANTS["moh"].attention], ids=["dense", "moh"])
def test_so_are_those_of_heads_of_any_widths(attention):
    widths = Variant(name="widths", label="", attention=attention, head_dims=(8, 4, 8, 4))
    run = dataclasses.replace(tiny("moh-heads-of-two-widths"), **SIZES)
    names = ("attention.o_proj.weight", "mlp.down_proj.weight")
    factors = scaled(widths, run=run)
    assert sorted(factors) == sorted(f"layers.{layer}.{n}" for layer in range(3) for n in names)
    assert set(factors.values()) == {round(6**-0.5, 5)}
    plain = build_model(run, widths, vocab_size=300, seed=0).layers[0].mlp.up_proj.weight
    assert plain.std().item() == pytest.approx((2 / (5 * 24)) ** 0.5, rel=0.1)


def test_the_factor_is_a_field_of_the_run():
    assert set(scaled(VARIANTS["dense"], 0.25).values()) == {0.25}


@pytest.mark.parametrize("scale", [0.0, 1.5, float("nan")])
def test_a_factor_out_of_range_is_refused(scale):
    with pytest.raises(ValueError, match=r"residual_scale is .*; it must lie in 0\.\.1, above 0"):
        dataclasses.replace(RUN, residual_scale=scale)
