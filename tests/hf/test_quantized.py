"""Converted models that torchao, optimum-quanto and torch.ao quantise, and what is left out."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

from headwise import MoEConfig, MoHConfig, bitnet, convert, load
from headwise.hf import quantized_bytes

# Quantisers take widths of 16 and more.
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 64}
EXPERTS = MoEConfig(num_experts=5, top_k=2, expert_dim=16)
ROUTED = MoHConfig(router="two_stage", router_std=0.02)
PROJECTIONS = {f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkvo"}
STACKED = {f"model.layers.*.mlp.layer.experts.{name}" for name in ("gate_up_proj", "down_proj")}
ALWAYS_FULL = {
    "model.embed_tokens.weight", "model.layers.*.mlp.layer.router.weight",
    *(f"model.layers.*.self_attn.router.{name}.weight" for name in ("shared", "routed", "stage")),
}  # fmt: skip
# What torchao says of itself when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*(torchao|quantization|deprecated).*")


@pytest.fixture
def model(tiny):
    return convert(tiny(**WIDE), attention=ROUTED, mlp=EXPERTS)


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.quantization", reason="torchao is not installed")


@pytest.fixture
def quanto():
    return pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")


def assert_computes_as(quantized, logits, ids):
    """As before, up to what 8 bits lose."""
    with torch.no_grad():
        got = quantized(ids).logits
        assert_close(got, logits, rtol=0, atol=0.05 * logits.abs().max().item())
        assert not torch.equal(got, logits)
        quantized.generate(ids, max_new_tokens=3, do_sample=False)


def bytes_of(model, *ends):
    return sum(p.nbytes for name, p in model.named_parameters() if name.endswith(ends))


def test_nothing_is_quantised(model):
    found = quantized_bytes(model)
    assert found.quantized == 0
    assert found.total == sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    assert found.left_out.keys() == PROJECTIONS | STACKED | ALWAYS_FULL | {"lm_head.weight"}
    assert list(found.left_out.values()) == sorted(found.left_out.values(), reverse=True)
    up = "model.layers.*.mlp.layer.experts.gate_up_proj"
    assert found.left_out[up] == 2 * 5 * 32 * 32 * 4
    assert f"0 of {found.total:,} bytes are quantised; in full precision: {up} 40,960" in str(found)
    with pytest.raises(ValueError, match="model is None"):
        quantized_bytes(None)


def test_torchao_in_place(model, ids, torchao):
    want, before = model(ids).logits, quantized_bytes(model)
    linear = bytes_of(model, *(f"{x}_proj.weight" for x in "qkvo"), "lm_head.weight")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert_computes_as(model, want, ids)
    found = quantized_bytes(model)
    assert found.left_out.keys() == STACKED | ALWAYS_FULL
    # A byte a weight, and a scale a row.
    assert linear / 4 < found.quantized < linear / 2
    assert found.total == before.total - linear + found.quantized


@pytest.mark.works_with("torchao", "int8 weights while loading")
@pytest.mark.parametrize("experts", [False, True])
def test_torchao_while_loading(model, ids, torchao, tmp_path, experts):
    want = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    int8 = torchao.Int8WeightOnlyConfig()
    if experts:
        of_experts = dict.fromkeys(("re:.*experts.gate_up_proj", "re:.*experts.down_proj"), int8)
        int8 = torchao.FqnToConfig({"_default": int8, **of_experts})
    options = {"quantization_config": TorchAoConfig(int8), "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert_computes_as(loaded, want, ids)
    stays = ALWAYS_FULL | {"lm_head.weight"} | (set() if experts else STACKED)
    assert quantized_bytes(loaded).left_out.keys() == stays
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert quantized_bytes(again) == quantized_bytes(loaded)


@pytest.mark.parametrize("glu", [True, False])
def test_experts_that_torchao_quantised_compute_what_they_stand_for(tiny, ids, torchao, glu):
    config = MoEConfig(num_experts=5, top_k=2, expert_dim=16, glu=glu, shared_expert_dim=16)
    model = convert(tiny(**WIDE), mlp=config)
    plain = copy.deepcopy(model)
    int8 = torchao.Int8WeightOnlyConfig()
    torchao.quantize_(model, torchao.FqnToConfig({"re:.*experts.*_proj": int8}), filter_fn=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                plain.get_parameter(name).copy_(parameter.dequantize())
    assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_quanto_in_place(model, ids, quanto):
    want = model(ids).logits
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert_computes_as(model, want, ids)
    found = quantized_bytes(model)
    assert found.left_out.keys() == STACKED | ALWAYS_FULL
    assert found.quantized > 0


@pytest.mark.works_with("optimum-quanto", "int8 weights while loading")
def test_quanto_while_loading(model, ids, quanto, tmp_path):
    want = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    assert_computes_as(loaded, want, ids)
    stays = STACKED | ALWAYS_FULL | {"lm_head.weight"}
    assert quantized_bytes(loaded).left_out.keys() == stays


def test_the_dynamic_quantisation_of_torch_and_what_it_leaves_out(model, ids):
    want = model(ids).logits
    dynamic = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    assert_computes_as(dynamic, want, ids)
    found = quantized_bytes(dynamic)
    # It goes by the exact type, which projections that leave out heads have not.
    skipping = {f"model.layers.*.self_attn.{name}_proj.weight" for name in "qo"}
    assert found.left_out.keys() == STACKED | ALWAYS_FULL | skipping
    assert found.quantized == (2 * 2 * 16 * 32) + 31 * 32


def test_packed_models_are_quantised(tiny):
    packed = bitnet.pack(convert(tiny(**WIDE), mlp=EXPERTS, ternary=True))
    found = quantized_bytes(packed)
    assert found.left_out.keys() == {
        "model.embed_tokens.weight", "model.layers.*.mlp.layer.router.weight", "lm_head.weight"
    }  # fmt: skip
    # A quarter of a byte a weight.
    assert found.quantized == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 5 * (32 * 32 + 16 * 32)) / 4
