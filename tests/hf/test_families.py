"""What the documentation's table of model families promises, a cell a test, on tiny models."""

from functools import cache

import pytest
import torch
import transformers
from conversions import ALL_ON, EAGER, FAMILIES, MH_MOE, QUERY_NORM
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close

from gradients import assert_checkpointing_changes_none
from headwise import MoHConfig, convert, fit, load, record_routing

GENERATING = tuple(name for name, (_, model, _) in FAMILIES.items() if "LM" in model)[:-1]
ROUTERS = {
    "query_norm": QUERY_NORM,
    "two_stage": MoHConfig(shared=0.25, active=0.75, router="two_stage", router_std=0.02),
    "lists": MoHConfig(router="query_norm", shared=[[0, 3], [1], []], active=[4, 3, 2]),
    "fitted": MoHConfig(router="fitted", active=4),
}


def tiny(family):
    config, model, sizes = FAMILIES[family]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    # As they are, all queries are about equally long.
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" not in name.lower() and parameter.ndim > 1:
                parameter.mul_(10)
            elif "q_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return built


def inputs(family):
    if family == "ViT":
        return {"pixel_values": torch.randn(2, 3, 10, 10), "labels": torch.tensor([1, 4])}
    ids = torch.randint(3, 31, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def converted(family, router):
    return convert(tiny(family), attention=attention(family, router))


@cache
def attention(family, router):
    if router != "fitted":
        return ROUTERS[router]
    return fit(tiny(family), [inputs(family) for _ in range(12)], ROUTERS["fitted"])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_heads_on_it_is_the_original_bit_for_bit(family):
    given = inputs(family)
    original = tiny(family)
    original.set_attn_implementation("sdpa")
    want = original(**given).logits
    converted = convert(tiny(family), attention=ALL_ON)
    assert isinstance(converted, type(original))
    assert torch.equal(converted(**given).logits, want)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_off_as_budgeted(family, router):
    original = set(tiny(family).state_dict())
    model = converted(family, router)
    assert original <= set(model.state_dict())
    with record_routing(model) as routings:
        model(**inputs(family))
    want = {"query_norm": [4, 4, 4], "two_stage": [5, 5, 5], "lists": [4, 3, 2]}.get(router)
    if want is None:
        want = model.conversion.attention.active
        assert sum(want) == 12
    for routing, active in zip(routings.values(), want, strict=True):
        on = (routing.weights != 0).sum(-1)
        assert (on[... if routing.mask is None else routing.mask] == active).all()
    if router == "lists":
        first, second, _ = routings.values()
        for routing, heads in ((first, [0, 3]), (second, [1])):
            always = routing.weights[..., heads]
            assert (always[... if routing.mask is None else routing.mask] == 1).all()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "BERT"])
def test_experts_take_the_place_of_the_mlp(family):
    model = convert(tiny(family), mlp=MH_MOE, every=3)
    with record_routing(model) as routings:
        model(**inputs(family)).loss.backward()
    assert len(routings) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_originals_class_does_not_load_it(family, tmp_path):
    converted(family, "query_norm").save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"load it by headwise\.load"):
        type(tiny(family)).from_pretrained(tmp_path, **EAGER)
    assert isinstance(load(tmp_path), type(tiny(family)))


def unlabelled(family):
    return {name: x for name, x in inputs(family).items() if name != "labels"}


def base_of(family):
    """The model without a head, as AutoModel makes it."""
    config, _, sizes = FAMILIES[family]
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(getattr(transformers, config)(**sizes)).eval()


@pytest.mark.parametrize("build", [tiny, base_of])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_as_many_as_the_originals(family, build):
    given = (unlabelled if build is base_of else inputs)(family)
    dense = build(family)
    dense.set_attn_implementation("sdpa")
    want = dense(**given, output_hidden_states=True).hidden_states
    same = convert(build(family), attention=ALL_ON)(**given, output_hidden_states=True)
    assert len(want) == 4
    assert_close(same.hidden_states, want, rtol=0, atol=0)
    routed = convert(build(family), attention=ROUTERS["query_norm"])
    states = routed(**given, output_hidden_states=True).hidden_states
    assert [x.shape for x in states] == [x.shape for x in want]
    assert not torch.equal(states[-1], want[-1])


@pytest.mark.parametrize("build", [tiny, base_of])
@pytest.mark.parametrize("router", ["query_norm", "two_stage"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_that_nobody_keeps_are_refused(family, router, build):
    model = convert(build(family), attention=ROUTERS[router])
    given = (unlabelled if build is base_of else inputs)(family)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**given, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.base_model(**unlabelled(family), output_attentions=True)
    model.config._output_attentions = True
    assert model.config.output_attentions
    with pytest.raises(ValueError, match="output_attentions"):
        model(**given)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", GENERATING)
def test_it_generates_with_a_cache_as_without(family, router):
    model = converted(family, router)
    given = unlabelled(family)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    without = model.generate(**given, use_cache=False, **options)
    assert torch.equal(model.generate(**given, **options), without)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_a_step(family, router):
    model = converted(family, router).train()
    given = inputs(family)
    loss = model(**given).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        # The classifier does not read what BERT's and ViT's poolers say.
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp_min(1e-6)
    assert model(**given).loss != loss


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_saves_and_loads(family, router, tmp_path):
    model = converted(family, router)
    model.save_pretrained(tmp_path)
    kind = "CausalLM" if family in GENERATING else FAMILIES[family][1].partition("For")[2]
    again = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.conversion == model.conversion
    given = inputs(family)
    assert_close(again(**given).logits, model(**given).logits, rtol=0, atol=0)


OPTIONS = {
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams, static cache": {"num_beams": 3, "cache_implementation": "static"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", GENERATING)
def test_all_ways_of_generating_with_a_cache_agree_with_none(family, side, options):
    model = convert(tiny(family), attention=ROUTERS["query_norm"])
    given = unlabelled(family)
    if side == "right":
        given = {name: x.flip(1) for name, x in given.items()}
    beams = {"num_beams": options.get("num_beams", 1)}
    common = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    without = model.generate(**given, use_cache=False, **common, **beams)
    assert torch.equal(model.generate(**given, **common, **options), without)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family, router):
    def build():
        model = converted(family, router).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    given = inputs(family)
    assert_checkpointing_changes_none(build, lambda model: model(**given).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_in_bfloat16(family):
    given = inputs(family)
    given = {n: x.bfloat16() if x.is_floating_point() else x for n, x in given.items()}
    model = convert(tiny(family).bfloat16(), attention=ROUTERS["two_stage"])
    assert model(**given).logits.dtype == torch.bfloat16
    assert model(**given).loss.isfinite()
