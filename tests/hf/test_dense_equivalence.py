"""Conversions that change nothing: all heads on, heads that are off anyway, one expert."""

import copy

import pytest
import torch
from torch.testing import assert_close

from headwise import MoEConfig, MoHConfig, convert


@pytest.fixture(params=[(6, 0), (2, 2), (1, 6)], ids=str)
def models(request, tiny):
    """The original and its conversion, for several numbers of key heads and of shared heads."""
    kv_heads, shared = request.param
    original = tiny(num_key_value_heads=kv_heads)
    assert original.config._attn_implementation == "sdpa"
    config = MoHConfig(shared=shared, active=1.0, router="query_norm")
    return original, convert(copy.deepcopy(original), attention=config)


def test_forward(models, ids):
    original, converted = models
    assert torch.equal(original(ids).logits, converted(ids).logits)


def test_forward_with_padding(models, ids, attention_mask):
    logits = [model(ids, attention_mask=attention_mask).logits for model in models]
    assert torch.equal(*logits)


def test_gradients(models, ids):
    for model in models:
        model(ids, labels=ids).loss.backward()
    original, converted = (dict(model.named_parameters()) for model in models)
    assert original.keys() == converted.keys()
    assert all(torch.equal(p.grad, converted[name].grad) for name, p in original.items())


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("left_padding", [False, True])
def test_generate(models, ids, cache, left_padding):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if left_padding else 1
    options = {"cache_implementation": cache} if cache else {"use_cache": False}
    results = [
        model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
            return_dict_in_generate=True, output_scores=True, **options,
        )
        for model in models
    ]  # fmt: skip
    assert torch.equal(*(r.sequences for r in results))
    assert all(map(torch.equal, *(r.scores for r in results)))


@pytest.mark.parametrize("router", ["query_norm", "two_stage"])
def test_heads_that_are_off_are_heads_that_are_cut(tiny, ids, router):
    """Heads 0 and 1 are shared, every token is made to choose 2 and 3: so 4 and 5 do nothing."""
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data[8:16] *= 100
    cut = copy.deepcopy(model)
    for layer in cut.model.layers:
        layer.self_attn.o_proj.weight.data[:, 16:] = 0
    convert(model, attention=MoHConfig(shared=2, active=4, router=router, router_std=0.02))
    for name, parameter in model.named_parameters():
        if ".router." in name:
            # Scores that tie choose the lowest heads, and all gates that are on are 1.
            parameter.data.zero_()
    assert_close(model(ids).logits, cut(ids).logits, rtol=1e-4, atol=1e-5)


def test_one_expert_with_the_mlps_weights_is_the_mlp(tiny, ids):
    model, original = tiny(), tiny()
    convert(model, mlp=MoEConfig(num_experts=1, top_k=1, expert_dim=29))
    for layer, old in zip(model.model.layers, original.model.layers, strict=True):
        experts = layer.mlp.layer.experts
        up = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
        experts.gate_up_proj.data[0] = up.data
        experts.down_proj.data[0] = old.mlp.down_proj.weight.data
    assert_close(model(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-6)
