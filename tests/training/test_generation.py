"""Continuing a text: what of a prompt, a temperature and a length can be asked for."""

import math

import pytest

from headwise.data.text import END_OF_TEXT
from headwise.training.generation import continue_text
from tiny import llama, tokenizer


@pytest.fixture(scope="module")
def bytewise():
    return tokenizer("a b c", vocab_size=257, eos_token=None, pad_token=END_OF_TEXT)


@pytest.fixture(scope="module")
def model():
    """Takes 11 tokens, of which each is a byte."""
    no_ends = {"bos_token_id": None, "eos_token_id": None}
    return llama(vocab_size=257, max_position_embeddings=11, **no_ends)


def continued(model, bytewise, prompt="abc", **changes):
    fields = {"max_new_tokens": None, "temperature": 0.0, "seed": 0} | changes
    return continue_text(model, bytewise, prompt, **fields)


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
def test_what_cannot_be_written_is_refused_by_name(model, bytewise, changes, message):
    with pytest.raises(ValueError, match=message):
        continued(model, bytewise, **changes)


def test_without_a_length_it_writes_as_far_as_the_model_goes(model, bytewise):
    for length, new in ((3, 8), (10, 1)):
        text = continued(model, bytewise, "a" * length)
        assert text == continued(model, bytewise, "a" * length, max_new_tokens=new)


def test_a_length_beyond_memory_is_refused_where_the_model_has_no_end(model, bytewise):
    changed = model.config.max_position_embeddings
    model.config.max_position_embeddings = -1  # as XLNet says of none
    with pytest.raises(ValueError, match=r"max_new_tokens is 1000000000000: .* GiB of memory"):
        continued(model, bytewise, max_new_tokens=10**12)
    model.config.max_position_embeddings = changed


@pytest.mark.parametrize("temperature", [1e-6, 1e300])
def test_the_ends_of_temperature_can_be_sampled_at(model, bytewise, temperature):
    assert continued(model, bytewise, temperature=temperature, max_new_tokens=5)
