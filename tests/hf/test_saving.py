"""save_pretrained and back by AutoModelForCausalLM; weights and formats that do not fit."""

import json

import pytest
import torch
from conversions import GROUPS, LEARNED, MH_MOE, MOE, TWO_STAGE
from transformers import AutoConfig, AutoModelForCausalLM

from damage import edit_json, edit_weights
from headwise import MoHConfig, convert
from headwise.hf import Conversion

CONVERSIONS = {
    "two_stage": {"attention": TWO_STAGE},
    "one_stage": {"attention": MoHConfig(router="one_stage", scores="sparsemax", router_std=0.02)},
    "query_norm": {"attention": MoHConfig(router="query_norm")},
    "groups": {"attention": GROUPS},
    "moe": {"mlp": MOE, "every": 2},
    "both": {"attention": LEARNED, "mlp": MH_MOE},
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("conversion", CONVERSIONS.values(), ids=CONVERSIONS)
def test_a_saved_model_loads_as_it_was(tiny, tmp_path, ids, family, conversion):
    model = convert(tiny(family), **conversion)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.conversion == model.conversion == Conversion(**conversion)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not again.training
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(twice(ids).logits, model(ids).logits)


def test_a_saved_model_loads_in_another_dtype_and_with_its_loading_info(tiny, tmp_path):
    convert(tiny(), **CONVERSIONS["both"]).save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not info["missing_keys"]


def test_tied_embeddings_load(tiny, tmp_path, ids):
    model = convert(tiny(tie_word_embeddings=True), **CONVERSIONS["two_stage"])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_config_says_headwise(tiny, tmp_path):
    model = convert(tiny(), **CONVERSIONS["both"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("headwise", "llama")
    assert config["headwise"] == model.conversion.to_dict()
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)


ROUTER = "model.layers.1.self_attn.router.routed.weight"
UP = "model.layers.0.mlp.layer.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(ROUTER), f"missing_keys.*{ROUTER}"),
        (lambda w: w.pop(UP), f"missing_keys.*{UP}"),
        (lambda w: w.update(surplus=torch.zeros(3)), "unexpected_keys.*surplus"),
        (lambda w: w.update({ROUTER: torch.zeros(3, 24)}), f"mismatched_keys.*{ROUTER}"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(tiny, tmp_path, edit, message):
    convert(tiny(), **CONVERSIONS["both"]).save_pretrained(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_is_refused(tiny, tmp_path):
    convert(tiny(), **CONVERSIONS["two_stage"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config["headwise"].update(format=99))
    with pytest.raises(ValueError, match=r"format 99.*upgrade"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
