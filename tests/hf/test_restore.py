"""The way back from routed heads."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from headwise import MoEConfig, MoHConfig, convert
from headwise.hf import restore
from tiny import SIZES

IDS = torch.randint(31, (2, 7))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=6, n_positions=9))


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("router", ["query_norm", "two_stage"])
def test_it_is_the_model_before_the_conversion(build, router, tmp_path):
    before = build().eval()
    attention = MoHConfig(shared=2, active=4, router=router, router_std=0.02)
    back = restore(convert(copy.deepcopy(before), attention=attention))
    assert type(back) is type(before)
    assert type(back.config) is type(before.config)
    before.set_attn_implementation("sdpa")
    assert torch.equal(back(IDS).logits, before(IDS).logits)
    back.save_pretrained(tmp_path)
    again, info = type(before).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(IDS).logits, back(IDS).logits)


def test_weights_are_copies():
    converted = convert(llama(), attention=MoHConfig(router="query_norm"))
    kept = {k: v.clone() for k, v in converted.state_dict().items()}
    for parameter in restore(converted).parameters():
        parameter.data.zero_()
    assert_close(converted.state_dict(), kept, rtol=0, atol=0)


def test_what_has_no_original_is_refused():
    for model in (llama(), "some/path", None):
        kind = type(model).__name__
        with pytest.raises(ValueError, match=f"model is a {kind}; it must be a converted model"):
            restore(model)
    experts = convert(llama(), mlp=MoEConfig(num_experts=2, top_k=1, expert_dim=8))
    with pytest.raises(ValueError, match=r"has experts for its MLPs, so .*; load the original"):
        restore(experts)
