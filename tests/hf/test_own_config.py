"""A converted model's config is its own, and says alone what the model is."""

import copy

import pytest
from conversions import MH_MOE, QUERY_NORM
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
)

from headwise import MoHConfig, convert
from tiny import SIZES

MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "base": (LlamaConfig, LlamaModel),
    "bert": (BertConfig, BertForMaskedLM),
}


def configs(model):
    values = (value for module in model.modules() for value in vars(module).values())
    return [value for value in values if isinstance(value, PreTrainedConfig)]


@pytest.mark.parametrize("kinds", MODELS.values(), ids=MODELS)
def test_a_config_that_models_share_stays_as_it_was(kinds):
    config_class, model_class = kinds
    config = config_class(**SIZES)
    before = copy.deepcopy(config)
    twin, model = model_class(config), model_class(config)
    implementation = config._attn_implementation
    convert(model, attention=QUERY_NORM)
    assert type(config) is config_class
    assert config.to_dict() == before.to_dict()
    assert config._attn_implementation == implementation
    assert all(found is config for found in configs(twin))
    assert len(configs(model)) > 2
    assert all(found is model.config for found in configs(model))
    assert type(model_class(config)) is model_class


def test_experts_alone_leave_a_shared_config_too():
    config = LlamaConfig(**SIZES)
    convert(LlamaForCausalLM(config), mlp=MH_MOE)
    assert type(config) is LlamaConfig
    assert not hasattr(config, "headwise")


def test_a_conversion_that_fails_leaves_the_config_in_its_place():
    config = LlamaConfig(**SIZES)
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="active is 7"):
        convert(model, attention=MoHConfig(shared=2, active=7))
    assert all(found is config for found in configs(model))


@pytest.mark.parametrize("kinds", MODELS.values(), ids=MODELS)
def test_the_config_of_a_fresh_conversion_is_enough_for_a_new_model(kinds, tmp_path):
    config_class, model_class = kinds
    # As of a model that was loaded from what another class had saved.
    model = model_class(config_class(**SIZES, architectures=["Another"]))
    convert(model, attention=QUERY_NORM)
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert config.architectures == [f"Routed{model_class.__name__}"]
    if model_class is LlamaModel:
        assert AutoModel.from_config(config).conversion == model.conversion
