"""Experts of converted models through transformers' ExpertsInterface; models of former versions."""

import copy
from dataclasses import replace

import pytest
import torch
from conversions import MH_MOE, MOE, TWO_STAGE
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from damage import edit_weights
from headwise import bitnet, convert, load
from headwise.hf.experts_interface import RoutedExperts
from headwise.nn.experts import Experts

# torch's grouped product takes widths of 16 bytes.
WIDE = {"expert_dim": 12, "shared_expert_dim": 5}
CONFIGS = {
    "moe": replace(MOE, **WIDE),
    "mh_moe": replace(MH_MOE, **WIDE),
    "two matrices": replace(MOE, **WIDE, glu=False, activation="gelu", router="cosine"),
    "inner residual": replace(MOE, **WIDE, inner_residual=True, activation="relu"),
}
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


def experts_of(model, layer=0):
    return model.model.layers[layer].mlp.layer.experts


def outputs_and_gradients(model, ids):
    """Of a training step; the model's biases and weights stay."""
    model = copy.deepcopy(model).train()
    output = model(ids, labels=ids)
    output.loss.backward()
    return output.logits, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_computes_the_same(tiny, ids, config, name):
    model = convert(tiny(), mlp=config)
    assert model.config._experts_implementation == "headwise"
    want, want_gradients = outputs_and_gradients(model, ids)
    model.set_experts_implementation(name)
    got, gradients = outputs_and_gradients(model, ids)
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == want_gradients.keys()
    for parameter, gradient in gradients.items():
        assert_close(gradient, want_gradients[parameter], rtol=1e-4, atol=1e-6, msg=parameter)


def test_experts_have_the_form_of_transformers_mixtures(tiny, config):
    experts = experts_of(convert(tiny(), mlp=config))
    sizes = {"hidden_size": 24, "num_experts": 7, "moe_intermediate_size": 12}
    original = Qwen3MoeExperts(Qwen3MoeConfig(**sizes))
    narrow = 24 // 3 if config is CONFIGS["mh_moe"] else 24
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    first = ("gate_up_proj", 24) if config.glu else ("up_proj", 12)
    assert shapes == {first[0]: (7, first[1], narrow), "down_proj": (7, narrow, 12)}
    assert not config.glu or shapes.keys() == dict(original.named_parameters()).keys()
    # Older versions of transformers know no norm after experts.
    for fact in ("has_bias", "is_transposed", "has_post_expert_norm", "is_concatenated"):
        assert getattr(experts, fact) == getattr(original, fact, False)
    assert experts.num_experts == original.num_experts == 7
    assert experts.has_gate == config.glu


def test_the_named_function_is_called_for_every_layer(tiny, ids, monkeypatch):
    model = convert(tiny(), mlp=MOE)
    seen = []

    def spy(experts, *args):
        seen.append(experts)
        return batched_mm_experts_forward(experts, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "batched_mm", spy)
    model.set_experts_implementation("batched_mm")
    model(ids)
    assert seen == [experts_of(model, layer) for layer in range(2)]


def test_the_implementation_is_chosen_while_loading_and_not_saved(tiny, ids, tmp_path):
    model = convert(tiny(), mlp=MOE)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    assert "eager" not in (tmp_path / "config.json").read_text()
    assert load(tmp_path).config._experts_implementation == "headwise"
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert chosen.config._experts_implementation == "batched_mm"
    assert_close(chosen(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r'experts_implementation="fast".*"headwise"'):
        model.set_experts_implementation("fast")


def test_a_copy_has_its_own_implementation(tiny):
    model = convert(tiny(), mlp=MOE)
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    assert experts_of(twin).config is twin.config
    assert experts_of(model).config._experts_implementation == "headwise"


def test_experts_that_the_model_had_are_computed_as_before(ids):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        head_dim=4, vocab_size=31, num_experts=7, num_experts_per_tok=2, moe_intermediate_size=12,
    )  # fmt: skip
    original = Qwen3MoeForCausalLM(config).eval()
    routed = convert(copy.deepcopy(original), mlp=CONFIGS["moe"], every=2)
    assert routed.config._experts_implementation == "headwise"
    x = torch.randn(2, 7, 24)
    before, after = (m.model.layers[0].mlp(x) for m in (original, routed))
    assert torch.equal(after, before)
    want = routed(ids).logits
    routed.set_experts_implementation("batched_mm")
    assert_close(routed(ids).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conversion", [{"attention": TWO_STAGE}, {"ternary": True}])
def test_a_model_without_experts_takes_what_it_took_before(tiny, tmp_path, conversion):
    model = convert(tiny(), **conversion)
    assert model.config._experts_implementation == "eager"
    model.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="is 'grouped_mm'; the model has no experts"):
        model.set_experts_implementation("grouped_mm")


def test_a_class_says_that_its_models_may_have_experts(tiny):
    assert type(convert(tiny(), mlp=MOE))._can_set_experts_implementation()


def test_ternary_experts_take_ours_only(tiny, ids, tmp_path):
    model = convert(tiny(), mlp=MOE, ternary=True)
    with pytest.raises(ValueError, match="experts_implementation is 'batched_mm'; ternary"):
        model.set_experts_implementation("batched_mm")
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)
    later = bitnet.ternarize(convert(tiny(), mlp=MOE))
    assert not any(isinstance(m, RoutedExperts) for m in later.modules())
    later.load_state_dict(model.state_dict())
    assert torch.equal(later(ids).logits, model(ids).logits)


def under_former_names(weights):
    """Gated matrices by the name that those of plain experts have to this day."""
    for name in list(weights):
        weights[name.replace(".gate_up_proj", ".up_proj")] = weights.pop(name)


@pytest.mark.parametrize("ternary", ["no", "trained", "packed"])
def test_a_model_saved_under_former_names_loads(tiny, ids, tmp_path, config, ternary):
    model = convert(tiny(), mlp=config, ternary=ternary != "no")
    model = bitnet.pack(model) if ternary == "packed" else model
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, under_former_names)
    for again in (
        load(tmp_path),
        type(model).from_pretrained(tmp_path),
        type(model).from_pretrained(tmp_path, config=model.config, output_loading_info=True)[0],
    ):
        assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


@pytest.mark.parametrize("glu", [True, False])
def test_tensors_under_former_names_load(glu):
    def experts():
        return Experts(7, 5, 11, glu=glu, activation="silu")

    layer, again = experts(), experts()
    state = {"up_proj": layer.first_proj, "down_proj": layer.down_proj}
    again.load_state_dict(state)
    assert torch.equal(again.first_proj, layer.first_proj)
    assert list(state) == ["up_proj", "down_proj"]
    both = {**layer.state_dict(), "surplus": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="surplus"):
        again.load_state_dict(both)
