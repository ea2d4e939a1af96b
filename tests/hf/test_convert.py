"""convert: what changes and what stays, generation, independence, and what it refuses."""

import copy
from dataclasses import replace

import pytest
import torch
from conversions import GROUPS, LEARNED, MH_MOE, MOE, QUERY_NORM
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from headwise import MHMoE, MHMoEConfig, MoE, MoHConfig, convert, record_routing
from headwise.hf import Conversion
from headwise.hf.surgery import RoutedMLP

CONVERSIONS = {
    "two_stage": {"attention": LEARNED},
    "query_norm": {"attention": QUERY_NORM},
    "groups": {"attention": GROUPS},
    "moe": {"mlp": MOE},
    "both": {"attention": replace(LEARNED, mode="paper"), "mlp": MH_MOE},
}
FAMILIES = ("llama", "mistral", "qwen3")


@pytest.fixture(params=[(f, c) for f in FAMILIES for c in CONVERSIONS], ids="-".join)
def converted(request, tiny):
    family, conversion = request.param
    return convert(tiny(family), **CONVERSIONS[conversion])


@pytest.mark.parametrize("padded", [0, 3])
def test_generate_with_a_cache_equals_without(converted, ids, padded):
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    without = converted.generate(ids, use_cache=False, **options)
    assert without.shape == (2, 12)
    for cache in ("dynamic", "static"):
        assert torch.equal(converted.generate(ids, cache_implementation=cache, **options), without)


def test_a_prompt_in_pieces_gives_the_same_logits(converted, ids):
    whole = converted(ids).logits
    cache, pieces = None, []
    for piece in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
        output = converted(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_tokens_do_not_depend_on_later_tokens_batch_mates_or_padding(
    converted, ids, attention_mask
):
    converted.double()
    real = attention_mask.bool()
    logits = converted(ids, attention_mask=attention_mask).logits
    # What stands in the padding does not matter, nor that there is any.
    changed = ids.masked_fill(~real, 5)
    assert_close(converted(changed, attention_mask=attention_mask).logits[real], logits[real])
    assert_close(converted(ids[:1, real[0]]).logits[0], logits[0, real[0]])
    assert_close(converted(ids[1:]).logits[0], logits[1])
    assert_close(converted(ids[1:, :4]).logits[0], logits[1, :4])


def test_every_second_layer_starting_with_the_second(tiny):
    model = convert(tiny(num_hidden_layers=5), mlp=MH_MOE, every=2)
    kinds = [isinstance(layer.mlp, RoutedMLP) for layer in model.model.layers]
    assert kinds == [False, True, False, True, False]
    assert type(model.model.layers[1].mlp.layer) is MHMoE
    assert type(convert(tiny(), mlp=MOE).model.layers[0].mlp.layer) is MoE


def test_parameters_that_are_kept_keep_their_names_and_values(tiny):
    original = tiny()
    before = copy.deepcopy(original.state_dict())
    converted = convert(original, attention=LEARNED, mlp=MOE, every=2)
    assert converted is original
    after = converted.state_dict()
    gone = {name for name in before if name not in after}
    assert gone == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert all(torch.equal(after[name], before[name]) for name in before if name not in gone)
    new = {name.removeprefix("model.layers.1.") for name in after if name not in before}
    assert {name for name in new if name.startswith("mlp")} == {
        "mlp.layer.router.weight", "mlp.layer.experts.gate_up_proj", "mlp.layer.experts.down_proj"
    }  # fmt: skip
    assert {"self_attn.router.shared.weight", "self_attn.router.routed.weight"} <= new


def test_the_class_and_the_conversion_can_be_asked(tiny):
    original = tiny()
    model_class = type(original)
    attention = replace(LEARNED, shared=2, active=5)
    model = convert(original, attention=attention, mlp=MH_MOE, every=2)
    assert isinstance(model, model_class)
    assert type(model).__name__ == "RoutedLlamaForCausalLM"
    assert model.config.model_type == "headwise"
    assert model.config.base_model_type == "llama"
    assert model.conversion == Conversion(attention=attention, mlp=MH_MOE, every=2)


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
def test_groups_are_those_of_the_models_key_heads(tiny, ids, router):
    attention = MoHConfig(shared=2, active=4, router=router, route_groups=True, router_std=0.02)
    model = convert(tiny(num_key_value_heads=3), attention=attention)
    with record_routing(model) as routings:
        model(ids)
    assert len(routings) == 2
    for routing in routings.values():
        assert ((routing.weights != 0).sum(-1) == 4).all()
        assert torch.equal(routing.weights[..., 0::2], routing.weights[..., 1::2])
        assert routing.probabilities.shape == (2, 7, 2)
        assert routing.indices.shape == (2, 7, 1)


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
def test_groups_of_one_head_change_nothing(tiny, ids, router):
    logits = []
    for route_groups in (False, True):
        model = tiny(num_key_value_heads=6)
        attention = MoHConfig(
            shared=1, active=4, router=router, route_groups=route_groups, router_std=0.02
        )
        logits.append(convert(model, attention=attention)(ids).logits)
    assert torch.equal(*logits)


def test_routers_and_experts_take_the_dtype_of_the_model(tiny, ids):
    model = convert(tiny().bfloat16(), attention=LEARNED, mlp=MOE)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(ids).logits.dtype == torch.bfloat16


def test_experts_start_with_the_models_own_deviation(tiny):
    model = convert(tiny(initializer_range=0.3), mlp=MH_MOE)
    layer = model.model.layers[0].mlp.layer
    assert layer.experts.down_proj.std().item() == pytest.approx(0.3, rel=0.15)
    up = 0.3 * layer.num_heads**0.5  # sub-tokens are so much narrower
    assert layer.experts.gate_up_proj.std().item() == pytest.approx(up, rel=0.15)


def test_a_path_is_loaded_first(tiny, tmp_path, ids):
    tiny().save_pretrained(tmp_path)
    model = convert(tmp_path, attention=MoHConfig(router="query_norm"))
    assert_close(
        model(ids).logits, convert(tiny(), attention=model.conversion.attention)(ids).logits
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"attention": replace(LEARNED, active=7)}, r"layer 0: active is 7.*1\.\.6"),
        (
            {"attention": replace(LEARNED, active=lambda i, n: i, shared=0)},
            r"active\[0\] is 0; .*least 1",
        ),
        (
            {"attention": replace(LEARNED, shared=0, active=4, route_groups=True)},
            "active is 4.* of 3",
        ),
        ({"attention": replace(LEARNED, shared=3, active=0.5)}, "shared equals active = 3"),
        ({"attention": LEARNED, "mlp": MHMoEConfig(num_heads=5, **vars(MOE))}, "num_heads is 5"),
        ({"mlp": MOE, "every": 3}, "every is 3, but the model has 2 layers"),
        ({"mlp": MOE, "every": 0}, "every is 0"),
        ({}, "attention and mlp are both None"),
    ],
)
def test_what_cannot_be_leaves_the_model_untouched(tiny, ids, wanted, message):
    model, original = tiny(), tiny()
    with pytest.raises(ValueError, match=message):
        convert(model, **wanted)
    assert_untouched(model, original)
    assert torch.equal(model(ids).logits, original(ids).logits)


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 31}
HEADS = {"attention": LEARNED}
GROUPED = {"head_dim": 4, "num_key_value_heads": 2}
REFUSED = {
    "cross attention": (GPT2LMHeadModel, GPT2Config, {"add_cross_attention": True}, HEADS),
    "AttentionInterface": (BloomForCausalLM, BloomConfig, {}, HEADS),
    "soft caps": (Gemma2ForCausalLM, Gemma2Config, GROUPED, HEADS),
    "no module `mlp`": (BertForMaskedLM, BertConfig, {"intermediate_size": 29}, {"mlp": MOE}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name_and_left_untouched(reason):
    model_class, config_class, more, conversion = REFUSED[reason]
    model = model_class(config_class(**SMALL, **more))
    original = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"{model_class.__name__} cannot be.*{reason}"):
        convert(model, **conversion)
    assert_untouched(model, original)


def assert_untouched(model, original):
    assert type(model) is type(original)
    assert type(model.config) is type(original.config)
    assert repr(model) == repr(original)
    assert model.config.to_dict() == original.config.to_dict()
    assert model.config._attn_implementation == original.config._attn_implementation
    after, before = model.state_dict(), original.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_converting_twice_is_refused(tiny):
    model = convert(tiny(), attention=LEARNED)
    with pytest.raises(ValueError, match="RoutedLlamaForCausalLM is converted already"):
        convert(model, mlp=MOE)


def test_attention_weights_are_refused(tiny, ids):
    model = convert(tiny(), attention=LEARNED)
    with pytest.raises(ValueError, match="output_attentions is True"):
        model(ids, output_attentions=True)


def test_with_attention_dropout_heads_that_are_off_stay_off(tiny, ids):
    attention = replace(LEARNED, shared=0, active=3)
    model = convert(tiny(attention_dropout=0.5), attention=attention)
    heads = []
    projection = model.model.layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    with record_routing(model.train()) as routings:
        model(ids)
        once = heads[-1].unflatten(-1, (6, 4))
        off = routings["model.layers.0.self_attn.router"].weights == 0
    assert off.sum() == off.numel() / 2
    assert (once[off] == 0).all()
    with torch.no_grad():
        model(ids)
    assert not torch.equal(heads[-1].unflatten(-1, (6, 4)), once)
