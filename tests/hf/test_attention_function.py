"""attn_implementation: routed heads take "headwise" only, however another one is asked for."""

import pytest
import torch
from conversions import QUERY_NORM, TWO_STAGE
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from headwise import MoEConfig, calibrate, convert

OTHERS = ("flash_attention_2", "flex_attention", "sdpa", "eager")
ROUTERS = {"query_norm": QUERY_NORM, "two_stage": TWO_STAGE}


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
    model = convert(tiny(), attention=QUERY_NORM)
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
    logits = [convert(model, attention=QUERY_NORM)(ids).logits for model in models]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["flex_attention", "flash_attention_2"])
def test_a_model_loaded_with_another_is_refused(tiny, ids, name):
    model = tiny()
    # As set_attn_implementation sets it where flash attention is installed.
    model.config._attn_implementation = name
    for change in (
        lambda: convert(model, attention=TWO_STAGE),
        lambda: calibrate(model, [{"input_ids": ids, "labels": ids}], QUERY_NORM),
    ):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot be .*{name}.*load it witho"):
            change()
    assert model.config._attn_implementation == name
    assert not any("router" in module for module, _ in model.named_modules())


def test_a_model_with_experts_alone_takes_any(tiny, tmp_path):
    model = convert(tiny(), mlp=MoEConfig(num_experts=3, top_k=1, expert_dim=5))
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.config._attn_implementation == "eager"


class Keeping(LlamaAttention):
    """Adds to the forward above, and passes everything on."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)


class Dropping(LlamaAttention):
    """Takes **kwargs and does not pass them on."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, attention_mask)


class Without(LlamaAttention):
    """Takes no **kwargs."""

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values, position_ids
    ):
        return super().forward(hidden_states, position_embeddings, attention_mask)


class Losing(LlamaAttention):
    """Reads its **kwargs, but loses the routing."""

    def forward(self, hidden_states, **kwargs):
        kwargs.pop("routing", None)
        return super().forward(hidden_states, **kwargs)


def with_attention(model, kind):
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [Dropping, Without])
def test_a_model_that_would_drop_the_routing_is_refused_when_converted(tiny, kind):
    model = with_attention(tiny(), kind)
    message = (
        rf"LlamaForCausalLM cannot be converted: the forward of model\.layers\.0\.self_attn, a "
        rf"{kind.__name__}, does not pass its \*\*kwargs.*or take router 'query_norm'"
    )
    with pytest.raises(ValueError, match=message):
        convert(model, attention=TWO_STAGE)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any("router" in name for name, _ in model.named_modules())


def test_a_forward_that_only_adds_converts(tiny, ids):
    plain = convert(tiny(), attention=TWO_STAGE)
    adding = convert(with_attention(tiny(), Keeping), attention=TWO_STAGE)
    adding.load_state_dict(plain.state_dict())
    assert torch.equal(adding(ids).logits, plain(ids).logits)


def test_a_router_by_queries_needs_nothing_passed_on(tiny, ids):
    want = convert(tiny(), attention=QUERY_NORM)(ids, use_cache=False).logits
    model = convert(with_attention(tiny(), Dropping), attention=QUERY_NORM)
    assert torch.equal(model(ids, use_cache=False).logits, want)


def test_a_routing_that_is_lost_on_the_way_is_an_error(tiny, ids):
    model = convert(with_attention(tiny(), Losing), attention=TWO_STAGE)
    with pytest.raises(ValueError, match="Losing was given a routing and did not pass it on"):
        model(ids)
