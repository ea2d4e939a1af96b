"""Experts that start from the MLP: equal with all on, an estimate with fewer; what is refused."""

import copy
import json

import pytest
import torch
from conversions import QUERY_NORM
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from headwise import MHMoEConfig, MoEConfig, convert
from headwise.hf import Conversion

FIELDS = {"num_experts": 5, "top_k": 5, "expert_dim": 7, "experts_from": "mlp"}
MLP_DIM = 35


@pytest.fixture
def original(tiny):
    return tiny(intermediate_size=MLP_DIM)


@pytest.mark.parametrize(
    "options", [{}, {"normalize_top_k": False}, {"scores": "sigmoid", "bias_rate": 0.1}], ids=str
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_with_every_expert_on_the_model_is_as_it_was(tiny, ids, family, options):
    model = tiny(family, intermediate_size=MLP_DIM)
    want = model(ids).logits
    convert(model, mlp=MoEConfig(**FIELDS, **options))
    assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_with_heads_routed_as_well(original, ids):
    want = convert(copy.deepcopy(original), attention=QUERY_NORM)(ids).logits
    got = convert(original, attention=QUERY_NORM, mlp=MoEConfig(**FIELDS), every=2)(ids).logits
    assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_expert_alone_by_hand(original):
    mlp, x = original.model.layers[0].mlp, torch.randn(2, 3, 24)
    layer = convert(original, mlp=MoEConfig(**FIELDS | {"top_k": 1})).model.layers[0].mlp.layer
    y, routing = layer(x)
    gate, up = (p.weight.unflatten(0, (5, 7)) for p in (mlp.gate_proj, mlp.up_proj))
    down = mlp.down_proj.weight.unflatten(1, (5, 7))
    for row, token, expert in zip(
        y.flatten(0, 1), x.flatten(0, 1), routing.indices.flatten(), strict=True
    ):
        hidden = torch.nn.functional.silu(gate[expert] @ token) * (up[expert] @ token)
        assert_close(row, 5 * down[:, expert] @ hidden, rtol=1e-4, atol=1e-5)


def test_with_fewer_experts_tokens_spread_and_all_train(original, ids):
    model = convert(original, mlp=MoEConfig(**FIELDS | {"top_k": 2})).train()
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        gradient = layer.mlp.layer.experts.down_proj.grad
        assert gradient.flatten(1).any(1).sum() > 2


def test_a_saved_model_keeps_what_was_trained(original, tmp_path, ids):
    model = convert(original, mlp=MoEConfig(**FIELDS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.conversion == model.conversion
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_configurations_from_before_the_field_load():
    saved = json.loads(json.dumps(Conversion(mlp=MoEConfig(**FIELDS)).to_dict()))
    del saved["mlp"]["experts_from"]
    assert Conversion.from_dict(saved).mlp.experts_from == "random"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_from": "mean"}, "experts_from is 'mean'"),
        ({"glu": False}, "glu is False; with experts_from 'mlp' it must be True"),
        ({"router": "cosine"}, "router is 'cosine'.* must be 'linear'"),
        ({"router": "fitted", "experts_from": "random"}, "experts_from is 'random'.* be 'mlp'"),
        ({"router": "fitted", "scores": "sigmoid"}, "scores is 'sigmoid'.* must be 'softmax'"),
        ({"router": "fitted", "bias_rate": 0.1}, "bias_rate is 0.1.* must be 0"),
        ({"router": "fitted", "shared_expert_dim": 3}, "a multiple of expert_dim = 7"),
        ({"inner_residual": True}, "inner_residual is True.* must be False"),
        ({"shared_expert_dim": 3}, "shared_expert_dim is 3.* must be None"),
        ({"scores": "sigmoid", "normalize_top_k": False}, "normalize_top_k is False.*must be True"),
    ],
)
def test_fields_that_do_not_go_with_it(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**FIELDS | fields)


def test_one_head_of_experts_keeps_the_model(original, ids):
    want = original(ids).logits
    convert(original, mlp=MHMoEConfig(num_heads=1, bias=True, **FIELDS))
    assert_close(original(ids).logits, want, rtol=1e-4, atol=1e-5)


def test_an_expert_of_several_heads_by_hand(original):
    mlp, x = original.model.layers[0].mlp, torch.randn(1, 1, 24)
    fields = FIELDS | {"num_experts": 10, "top_k": 1}
    layer = convert(original, mlp=MHMoEConfig(num_heads=2, **fields)).model.layers[0].mlp.layer
    y, routing = layer(x)
    for part, expert in enumerate(routing.indices.flatten().tolist()):
        hidden, read = slice(7 * (expert // 2), 7 * (expert // 2) + 7), 12 * (expert % 2)
        token = x[0, 0, 12 * part : 12 * part + 12]
        gate, up = (
            2**0.5 * p.weight[hidden, read : read + 12] @ token
            for p in (mlp.gate_proj, mlp.up_proj)
        )
        want = (
            5 * mlp.down_proj.weight[read : read + 12, hidden] @ (up * torch.sigmoid(gate) * gate)
        )
        assert_close(y[0, 0, 12 * part : 12 * part + 12], want, rtol=1e-4, atol=1e-5)


def test_heads_need_experts_for_each_part():
    with pytest.raises(ValueError, match=r"num_experts is 5; .* a multiple of num_heads = 2"):
        MHMoEConfig(num_heads=2, **FIELDS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_dim": 6}, "expert_dim is 6 with 5 slices.* LlamaMLP, 35: expert_dim 7"),
        ({"num_experts": 6, "top_k": 1}, "LlamaMLP, 35: num_experts must divide it"),
        ({"activation": "gelu"}, "activation is 'gelu'.* that of LlamaMLP, SiLU"),
    ],
)
def test_experts_that_do_not_fit_leave_the_model_as_it_was(original, ids, fields, message):
    want = original(ids).logits
    with pytest.raises(ValueError, match=message):
        convert(original, mlp=MoEConfig(**FIELDS | fields))
    assert torch.equal(original(ids).logits, want)


def test_an_mlp_of_another_layout_is_refused_by_name():
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 6, "vocab_size": 31, "n_inner": MLP_DIM}
    with pytest.raises(ValueError, match=r"GPT2MLP is not made of gate_proj.*must be 'random'"):
        convert(GPT2LMHeadModel(GPT2Config(**sizes)), mlp=MoEConfig(**FIELDS))
