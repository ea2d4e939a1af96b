"""The model card: metadata that the hub reads, where the original came from, figures."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from headwise import MoHConfig, convert
from headwise.hf.card import budget_lines, model_card
from tiny import SIZES


def card(path, original=None):
    original = original or LlamaForCausalLM(LlamaConfig(**SIZES))
    model = convert(original, attention=MoHConfig(router="query_norm"))
    return model_card(model, str(path), "new", weights="As they were.")


def test_the_metadata_of_a_model_from_the_hub():
    text = card("someone/some-model")
    assert ModelCard(text).data.to_dict() == {
        "library_name": "transformers",
        "base_model": "someone/some-model",
        "pipeline_tag": "text-generation",
        "tags": ["headwise", "mixture-of-head-attention"],
    }
    for part in ("# some-model with", "As they were.", "pip install headwise", "import headwise"):
        assert part in text
    assert "- all 2 layers: heads=6: 3 shared" in text
    assert "perplexity" not in text


@pytest.mark.parametrize(
    ("source", "base_model"), [("someone/some-model", "someone/some-model"), ("/a/b", None)]
)
def test_a_directory_names_its_original_where_that_is_on_the_hub(tmp_path, source, base_model):
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": source}))
    assert ModelCard(card(tmp_path)).data.base_model == base_model
    (tmp_path / "config.json").write_text("{}")
    assert ModelCard(card(tmp_path)).data.base_model is None


@pytest.mark.parametrize("source", ["someone/some-model", "models/local"])
def test_a_model_made_from_a_converted_one_names_the_original_too(tmp_path, source):
    if source == "models/local":
        source = str(tmp_path / source)
        Path(source).mkdir(parents=True)
        (Path(source) / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(card(source))
    (tmp_path / "config.json").write_text("{}")
    text = card(tmp_path)
    assert f"# {Path(source).name} with routed heads\n\n{Path(source).name}, converted" in text
    assert ModelCard(text).data == ModelCard(card(source)).data


def test_another_kind_of_model():
    text = card("bert", BertForMaskedLM(BertConfig(**SIZES)))
    assert ModelCard(text).data.pipeline_tag == "fill-mask"
    assert "AutoModelForMaskedLM.from_pretrained" in text


def test_a_line_for_each_layer_where_they_differ():
    attention = MoHConfig(router="query_norm", shared=[1, 2], active=4)
    model = convert(LlamaForCausalLM(LlamaConfig(**SIZES)), attention=attention)
    first, second = budget_lines(model)
    assert first.startswith("layer 0: heads=6: 1 shared")
    assert second.startswith("layer 1: heads=6: 2 shared")


def test_one_line_where_only_the_number_of_heads_that_are_on_differs():
    attention = MoHConfig(router="query_norm", shared=1, active=[2, 5])
    model = convert(LlamaForCausalLM(LlamaConfig(**SIZES)), attention=attention)
    (line,) = budget_lines(model)
    assert line == "heads on, of 6, layer by layer: 2 5; 3.5 on average, 1 of them shared"
