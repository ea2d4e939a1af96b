"""Continuing a text: what of a prompt, a temperature and a length can be asked for."""

import math

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.data.text import END_OF_TEXT, Domain, train_tokenizer
from headwise.training.generation import continue_text


@pytest.fixture(scope="module")
def tokenizer():
    words = train_tokenizer([Domain("a", {"a": "a b c"}, {})], vocab_size=257)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=END_OF_TEXT)


@pytest.fixture(scope="module")
def model():
    """Takes 11 tokens, of which each is a byte."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=257, hidden_size=8, intermediate_size=7, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=11, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def continued(model, tokenizer, prompt="abc", **changes):
    fields = {"max_new_tokens": None, "temperature": 0.0, "seed": 0} | changes
    return continue_text(model, tokenizer, prompt, **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": math.nan}, "temperature is nan; it must be 0 or lie in 1e-06..inf"),
        ({"temperature": math.inf}, "temperature is inf; it must be 0"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be 0"),
        ({"temperature": 1e-320}, "temperature is 1e-320; it must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"max_new_tokens": 9}, r"max_new_tokens is 9, after a prompt of 3 tokens; .* at most 11"),
        ({"max_new_tokens": 10**12}, r"max_new_tokens is 1000000000000, after a prompt of 3"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a" * 11}, "prompt has 11 tokens; .* at most 11 .* with those that it writes"),
        ({"prompt": "\udcff"}, r"prompt is '\\udcff', which is no UTF-8 text"),
        ({"seed": -1}, "seed is -1; it must lie in 0"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(model, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        continued(model, tokenizer, **changes)


def test_without_a_length_it_writes_as_far_as_the_model_goes(model, tokenizer):
    for length, new in ((3, 8), (10, 1)):
        text = continued(model, tokenizer, "a" * length)
        assert text == continued(model, tokenizer, "a" * length, max_new_tokens=new)


def test_a_length_beyond_memory_is_refused_where_the_model_has_no_end(model, tokenizer):
    changed = model.config.max_position_embeddings
    model.config.max_position_embeddings = -1  # as XLNet says of none
    with pytest.raises(ValueError, match=r"max_new_tokens is 1000000000000: .* GiB of memory"):
        continued(model, tokenizer, max_new_tokens=10**12)
    model.config.max_position_embeddings = changed


@pytest.mark.parametrize("temperature", [1e-6, 1e300])
def test_the_ends_of_temperature_can_be_sampled_at(model, tokenizer, temperature):
    assert continued(model, tokenizer, temperature=temperature, max_new_tokens=5)
