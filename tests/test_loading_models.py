"""Loading for the commands: whole models only, and what is damaged is named."""

import re

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from damage import edit_json, edit_weights, halve
from headwise import MoHConfig, convert
from headwise.commands.generate import load_model
from headwise.commands.write_text import WritingRun, write_text
from headwise.loading import load_causal_lm, load_config, load_tokenizer
from tiny import llama, tokenizer

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def of_words() -> PreTrainedTokenizerFast:
    return tokenizer("one two three " * 200)


@pytest.fixture(params=["dense", "tied", "converted"])
def directory(request, tmp_path, of_words):
    tied = request.param == "tied"
    model = llama(vocab_size=300, max_position_embeddings=64, tie_word_embeddings=tied)
    if request.param == "converted":
        convert(model, attention=MoHConfig(router="query_norm"))
    model.save_pretrained(tmp_path / "model")
    of_words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def in_config(**changes):
    """What changes fields of a directory's config."""
    return lambda directory: edit_json(directory / "config.json", lambda c: c.update(changes))


def test_what_is_whole_loads(directory):
    assert load_causal_lm(directory)(torch.arange(5)[None]).logits.isfinite().all()
    assert load_tokenizer(str(directory))("one two").input_ids


def test_a_surplus_weight_is_left_out_but_of_a_converted_model(directory):
    edit_weights(directory, lambda weights: weights.update(surplus=torch.zeros(3)))
    if "headwise" in (directory / "config.json").read_text():
        with pytest.raises(ValueError, match=r"unexpected_keys.*surplus"):
            load_causal_lm(directory)
    else:
        load_causal_lm(directory)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(Q_PROJ), f"missing_keys.*{Q_PROJ}"),
        (lambda w: w.update({Q_PROJ: torch.zeros(3, 24)}), f"mismatched_keys.*{Q_PROJ}"),
        (lambda w: w[Q_PROJ].view(-1)[7:8].fill_(torch.nan), rf"not finite: {Q_PROJ}$"),
        (lambda w: w[Q_PROJ].view(-1)[7:8].fill_(-torch.inf), rf"not finite: {Q_PROJ}$"),
    ],
)
def test_no_command_fills_up_weights(directory, tmp_path, edit, message):
    edit_weights(directory, edit)
    calls = [
        lambda: load_causal_lm(directory),
        lambda: load_model(directory),
        lambda: write_text(WritingRun(str(directory), tmp_path / "a.parquet", count=1)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{re.escape(str(directory))}.*{message}"):
            call()
    assert not (tmp_path / "a.parquet").exists()


def test_large_weights_are_no_infinite_ones(directory):
    edit_weights(directory, lambda weights: weights[Q_PROJ].fill_(2e38))
    load_causal_lm(directory)


# What to do to a directory, and how the error goes on that begins with its name.
DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "half a config": (lambda d: halve(d / "config.json"), "config.json"),
    "an empty config": (lambda d: (d / "config.json").write_text(""), "config.json"),
    "a list for a config": (lambda d: (d / "config.json").write_text("[]"), ""),
    "null for a config": (lambda d: (d / "config.json").write_text("null"), ""),
    "no heads": (in_config(num_attention_heads=0), "config.json"),
    "width of text": (in_config(hidden_size="wide"), "hidden_size.* int.*'wide'"),
    "an unknown activation": (in_config(hidden_act="none such"), "config.json.*none such"),
    "a class that is a number": (in_config(architectures=7), ""),
    "another vocabulary": (
        in_config(vocab_size=31),
        r"mismatched_keys: .*embed_tokens\.weight \[300, 24\], not \[31, 24\]",
    ),
    "another width": (in_config(hidden_size=48), r"keys: (?:[^:]* not [^:]*){3} and \d\d more$"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "model.safetensors"),
    "half the weights": (lambda d: halve(d / WEIGHTS), "safetensors"),
    "empty weights": (lambda d: (d / WEIGHTS).write_bytes(b""), "safetensors"),
    "weights of zeros": (lambda d: (d / WEIGHTS).write_bytes(bytes(1000)), "safetensors"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_named(directory, damage, message):
    damage(directory)
    with pytest.raises(ValueError, match=f"^.*{re.escape(str(directory))}.*{message}"):
        load_causal_lm(directory)


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_original_is_named(directory, damage, message):
    damage(directory)
    with pytest.raises(ValueError, match=f"^.*{re.escape(str(directory))}"):
        convert(directory, attention=MoHConfig(router="query_norm"))


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"added_tokens": 3}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_no_absent_one(directory, name, content):
    (directory / name).write_text(content)
    if name == "tokenizer_config.json" and content == '{"added_tokens": 3}':
        assert load_tokenizer(str(directory)) is not None
        return
    with pytest.raises(ValueError, match=f"{re.escape(str(directory))} holds a tokenizer that"):
        load_tokenizer(str(directory))


def test_an_absent_tokenizer_is_none(directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    assert load_tokenizer(str(directory)) is None


def test_a_config_that_no_class_can_be_made_of_is_named(directory):
    in_config(model_type="none such")(directory)
    with pytest.raises(
        ValueError, match=f"{re.escape(str(directory))} cannot be loaded: .*none such"
    ):
        load_config(directory)
