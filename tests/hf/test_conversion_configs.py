"""MoHConfig, MoEConfig, MHMoEConfig, Conversion: checked, frozen, there and back again."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from conversions import EXPERTS, LEARNED, MH_MOE, MOE, TWO_STAGE

from headwise import MHMoE, MHMoEConfig, MoE, MoEConfig, MoHConfig
from headwise.commands.convert import ConversionRun
from headwise.hf import Conversion
from headwise.nn import OneStageRouter, QueryNormRouter, TwoStageRouter
from headwise.recipes.dit import DiffusionRun
from headwise.recipes.lm import LanguageModelRun
from headwise.recipes.vit import VisionRun


@pytest.mark.parametrize(
    "conversion",
    [
        Conversion(attention=LEARNED),
        Conversion(
            attention=replace(LEARNED, shared=2, active=5, mode="paper", balance_coefficient=0)
        ),
        Conversion(attention=replace(LEARNED, route_groups=True)),
        Conversion(attention=MoHConfig(router="one_stage", scores="sigmoid", router_std=0.02)),
        Conversion(mlp=MHMoEConfig.first_version(**EXPERTS, num_heads=3)),
        Conversion(mlp=MoEConfig(**EXPERTS, scores="sigmoid", bias_rate=0.1, balance_scope="all")),
        Conversion(mlp=MoEConfig(**EXPERTS, z_loss_coefficient=0.1), every=3),
        Conversion(
            attention=MoHConfig(router="query_norm"),
            mlp=MHMoEConfig(**EXPERTS, num_heads=3, router="cosine", bias=True, head_layer=False),
        ),
        Conversion(ternary="trained"),
        Conversion(attention=LEARNED, ternary="packed"),
    ],
)
def test_a_conversion_survives_json(conversion):
    again = Conversion.from_dict(json.loads(json.dumps(conversion.to_dict())))
    assert again == conversion
    assert type(again.mlp) is type(conversion.mlp)


def test_a_conversion_from_before_fields_were_added_is_read():
    want = Conversion(attention=LEARNED, mlp=MOE)
    fields = want.to_dict()
    for name in ("route_groups", "scores"):
        del fields["attention"][name]
    for name in ("scores", "bias_rate", "balance_form", "balance_scope"):
        del fields["mlp"][name]
    assert Conversion.from_dict(fields) == want


def test_only_what_an_older_version_would_misread_needs_a_newer_format():
    plain, ternary, in_part = (
        Conversion(attention=LEARNED),
        Conversion(ternary="trained"),
        Conversion(attention=MoHConfig(), layers=(0, 2)),
    )
    assert [x.to_dict()["format"] for x in (plain, ternary, in_part)] == [1, 2, 3]
    assert Conversion.from_dict(in_part.to_dict()) == in_part
    assert "layers" not in plain.to_dict()
    fields = plain.to_dict()
    del fields["ternary"]
    assert Conversion.from_dict(fields) == plain


def test_a_newer_format_is_refused():
    fields = Conversion(attention=LEARNED).to_dict() | {"format": 4}
    with pytest.raises(ValueError, match=r"format 4.*up to 3.*upgrade"):
        Conversion.from_dict(fields)


def test_configs_build_what_they_name():
    assert type(MOE.build(15)) is MoE
    assert type(MH_MOE.build(15)) is MHMoE
    assert isinstance(LEARNED.build_router(0, dim=15, num_heads=5), TwoStageRouter)
    one_stage = MoHConfig(router="one_stage", scores="sparsemax", router_std=0.02)
    router = one_stage.build_router(0, dim=15, num_heads=5)
    assert isinstance(router, OneStageRouter)
    assert router.scores == "sparsemax"
    router = MoEConfig(**EXPERTS, scores="sigmoid", bias_rate=0.1).build(15).router
    assert (router.scores, router.bias_rate) == ("sigmoid", 0.1)
    config = MoHConfig(router="query_norm", shared=1, active=0.6)
    router = config.build_router(0, dim=15, num_heads=5)
    assert isinstance(router, QueryNormRouter)
    assert (router.budget.shared_heads, router.budget.active_heads) == (1, 3)
    config = replace(TWO_STAGE, route_groups=True)
    assert config.build_router(0, dim=15, num_heads=6, num_kv_heads=3).budget.heads_per_group == 2
    assert config.build_router(0, dim=15, num_heads=6).budget.heads_per_group == 1


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (MoHConfig, {"shared": True}, "shared is True"),
        (MoHConfig, {"active": "all"}, "active is 'all'"),
        (MoHConfig, {"shared": -1}, "shared is -1"),
        (
            MoHConfig,
            {"active": 1.5},
            r"active is 1\.5; .* int of at least 1 or a number above 0 and at most 1 or",
        ),
        (MoHConfig, {"shared": 0.8, "active": 0.5}, r"shared is 0\.8, more than active = 0\.5"),
        (
            MoHConfig,
            {"shared": 5, "active": 3},
            "shared is 5, more .* = 3, which counts shared .* lower shared or raise active$",
        ),
        (MoHConfig, {"router": "soft"}, "router is 'soft'; .* 'query_norm', 'fitted', 'output"),
        (MoHConfig, {"active": lambda layer: 0.5}, r"active is a function .* \(layer, number of l"),
        (MoHConfig, {"mode": "soft"}, "mode is 'soft'"),
        (MoHConfig, {"scores": "soft"}, "scores is 'soft'"),
        (
            MoHConfig,
            {"scores": "sigmoid", "router": "query_norm"},
            "scores is 'sigmoid'.*'softmax'",
        ),
        (MoHConfig, {"balance_coefficient": -0.1}, r"balance_coefficient is -0\.1"),
        (MoHConfig, {"balance_coefficient": float("nan")}, "balance_coefficient is nan"),
        (MoEConfig, {"num_experts": 0}, "num_experts is 0"),
        (MoEConfig, {"top_k": 8}, r"top_k is 8.*1\.\.7"),
        (MoEConfig, {"top_k": True}, "top_k is True"),
        (MoEConfig, {"expert_dim": 1.5}, r"expert_dim is 1\.5"),
        (MoEConfig, {"z_loss_coefficient": -1}, "z_loss_coefficient is -1"),
        (MoEConfig, {"balance_form": "mean"}, "balance_form is 'mean'"),
        (MoEConfig, {"balance_scope": "global"}, "balance_scope is 'global'"),
        (MoEConfig, {"bias_rate": -0.1}, r"bias_rate is -0\.1"),
        (MHMoEConfig, {"num_heads": 0}, "num_heads is 0"),
        (MHMoEConfig, {"num_heads": 3, "top_k": 0}, "top_k is 0"),
        (Conversion, {}, "attention and mlp are both None"),
        (Conversion, {"attention": LEARNED, "every": 0}, "every is 0"),
        (Conversion, {"ternary": True}, "ternary is True"),
    ],
)
def test_errors_name_the_field_and_the_value(config_class, fields, message):
    defaults = EXPERTS if issubclass(config_class, MoEConfig) else {}
    with pytest.raises(ValueError, match=message):
        config_class(**defaults | fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "tanh"},
        {"router": "hash"},
        {"shared_expert_dim": -1},
        {"scores": "sparsemax"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_every_field_of_an_experts_config_is_checked(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        MoEConfig(**EXPERTS | changes)


@pytest.mark.parametrize("parts", [0, 2, 3, 11])
def test_experts_in_parts(parts):
    config = MoEConfig(**EXPERTS, bias_rate=0.1)
    if 11 % max(parts, 2):
        with pytest.raises(ValueError, match=f"parts is {parts}; it must"):
            config.fine_grained(parts)
    else:
        fine = config.fine_grained(parts)
        assert (fine.num_experts, fine.top_k, fine.expert_dim) == (77, 22, 1)
        assert fine.bias_rate == 0.1


def test_configs_are_frozen_and_take_keywords_only():
    with pytest.raises(FrozenInstanceError):
        LEARNED.active = 0.5
    with pytest.raises(TypeError):
        MoHConfig(0.4, 0.75)


def test_the_default_is_safe_for_a_pretrained_model():
    assert (MoHConfig().router, MoHConfig().router_std) == ("query_norm", 0.0)
    learned = MoHConfig(router="two_stage").build_router(0, dim=15, num_heads=5)
    gates = learned(torch.randn(2, 7, 15)).weights
    assert ((gates == 0) | (gates == 1)).all()


def test_the_default_is_the_commands(tmp_path):
    command = ConversionRun(path="none", output=tmp_path / "new").attention()
    assert command == MoHConfig()


def test_what_was_saved_before_a_field_was_there_loads_as_it_was():
    fields = Conversion(attention=LEARNED).to_dict()
    want = Conversion.from_dict(fields)
    del fields["attention"]["router_std"], fields["attention"]["router"]
    assert Conversion.from_dict(fields) == want


@pytest.mark.parametrize(
    ("build", "std"),
    # DiT's 0 stands for the released code's start, by Xavier.
    [(LanguageModelRun, 0.02), (VisionRun, 0.02), (DiffusionRun, 0.0)],
)
def test_recipes_that_train_from_scratch_say_what_they_want(build, std):
    routed = [v.attention for v in build().variants() if v.attention is not None]
    assert routed
    assert all((a.router, a.router_std) == ("two_stage", std) for a in routed)
