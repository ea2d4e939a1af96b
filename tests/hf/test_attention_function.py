"""attn_implementation: routed heads take "headwise" only, however another one is asked for."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headwise import MoEConfig, MoHConfig, calibrate, convert

OTHERS = ("flash_attention_2", "flex_attention", "sdpa", "eager")
ROUTERS = {
    "query_norm": MoHConfig(router="query_norm", shared=2, active=4),
    "two_stage": MoHConfig(shared=2, active=4, router="two_stage", router_std=0.02),
}
EXPERTS = MoEConfig(num_experts=3, top_k=1, expert_dim=5)


@pytest.fixture(params=ROUTERS.values(), ids=ROUTERS)
def directory(request, tiny, tmp_path):
    convert(tiny(), attention=request.param).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", OTHERS)
def test_loading_with_another_is_refused(directory, name):
    message = f"attn_implementation is '{name}'; a model with routed heads takes 'headwise' only"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(directory, attn_implementation=name)
    config = AutoConfig.from_pretrained(directory)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(config, attn_implementation=name)


def test_loading_with_ours_or_none_works(directory, ids):
    loaded = [
        AutoModelForCausalLM.from_pretrained(directory, attn_implementation=name)
        for name in ("headwise", None)
    ]
    assert {model.config._attn_implementation for model in loaded} == {"headwise"}
    assert torch.equal(*(model(ids).logits for model in loaded))


@pytest.mark.parametrize("name", OTHERS)
def test_setting_another_is_refused(tiny, name):
    model = convert(tiny(), attention=ROUTERS["query_norm"])
    with pytest.raises(ValueError, match=f"attn_implementation is '{name}'"):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "headwise"


@pytest.mark.parametrize("router", ROUTERS)
def test_a_part_with_another_does_not_run(tiny, ids, router):
    model = convert(tiny(), attention=ROUTERS[router])
    model.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation is 'sdpa'"):
        model(ids)
    model.model.set_attn_implementation("headwise")
    model(ids)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_model_loaded_with_a_usual_one_converts(tiny, ids, name):
    models = [tiny(), tiny(attn_implementation=name)]
    assert models[1].config._attn_implementation == name
    logits = [convert(model, attention=ROUTERS["query_norm"])(ids).logits for model in models]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
def test_a_model_loaded_with_another_is_refused(tiny, ids, name):
    model = tiny()
    # As set_attn_implementation sets it where flash attention is installed.
    model.config._attn_implementation = name
    for change in (
        lambda: convert(model, attention=ROUTERS["two_stage"]),
        lambda: calibrate(model, [{"input_ids": ids, "labels": ids}], ROUTERS["query_norm"]),
    ):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot be .*{name}.*load it witho"):
            change()
    assert model.config._attn_implementation == name
    assert not any("router" in module for module, _ in model.named_modules())


def test_a_model_with_experts_alone_takes_any(tiny, tmp_path):
    model = convert(tiny(), mlp=EXPERTS)
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config._attn_implementation == "eager"
