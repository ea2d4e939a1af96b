"""Originals from a path: weights and directories that do not fit are refused and left alone."""

from unittest.mock import Mock

import pytest
import torch
from conversions import QUERY_NORM
from safetensors.torch import load_file
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, BertModel

from damage import contents, edit_json, edit_weights
from headwise import convert
from headwise.commands.convert import ConversionRun, convert_directory
from headwise.hf.loading import check_place
from tiny import SIZES

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def original(tiny, tmp_path):
    tiny().save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def name_the_class(directory, names):
    edit_json(directory / "config.json", lambda config: config.update(architectures=names))


def refuse(directory, message):
    """By the function and by the command, and nothing is written."""
    before, new = contents(directory), directory.with_name("new")
    with pytest.raises(ValueError, match=message):
        convert(directory, attention=QUERY_NORM)
    with pytest.raises(ValueError, match=message):
        convert_directory(ConversionRun(path=str(directory), output=new))
    assert contents(directory) == before
    assert not new.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop(UP), rf"missing_keys.*{UP}"),
        (lambda weights: weights.update({UP: torch.zeros(3, 24)}), rf"mismatched_keys.*{UP}"),
        (lambda weights: weights.pop("lm_head.weight"), r"missing_keys.*lm_head\.weight"),
    ],
)
def test_a_missing_or_misshapen_weight_is_named(original, edit, message):
    edit_weights(original, edit)
    refuse(original, message)


def test_a_surplus_weight_is_left_out(original, tiny, ids):
    edit_weights(original, lambda weights: weights.update(surplus=torch.zeros(3)))
    want = convert(tiny(), attention=QUERY_NORM)(ids).logits
    assert torch.equal(convert(original, attention=QUERY_NORM)(ids).logits, want)


def test_tied_weights_are_not_missing(tiny, tmp_path, ids):
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    want = convert(model, attention=QUERY_NORM)(ids).logits
    assert torch.equal(convert(tmp_path, attention=QUERY_NORM)(ids).logits, want)


def test_the_config_names_the_class(tmp_path):
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path)
    assert isinstance(convert(tmp_path, attention=QUERY_NORM), BertForSequenceClassification)
    # A head that the class lacks is surplus, one that the file lacks is missing.
    name_the_class(tmp_path, ["BertModel"])
    assert isinstance(convert(tmp_path, attention=QUERY_NORM), BertModel)
    edit_json(
        tmp_path / "config.json", lambda config: config.update(architectures=["BertForMaskedLM"])
    )
    refuse(tmp_path, r"missing_keys.*cls\.predictions")


def test_a_model_that_is_kept_from_the_hub_is_found_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no such directory.*hub cannot be asked.*offline"):
        check_place("someone/model")
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    check_place("someone/model")
    asked = Mock(return_value=True)
    monkeypatch.setattr("headwise.hf.loading.repo_exists", asked)
    check_place("someone/model", revision="other", token="mine")
    asked.assert_called_once_with("someone/model", token="mine")
    with pytest.raises(ValueError, match=r"no model on the Hugging Face hub can have this name$"):
        check_place("no/such/dir")


def test_a_directory_without_a_model(original, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", r"empty holds no model \(no config\.json\)$")
    (original / "model.safetensors").unlink()
    refuse(original, r"cannot be loaded: .*no file named model\.safetensors")
    with pytest.raises(ValueError, match="none holds no model: there is no such directory"):
        convert(tmp_path / "none", attention=QUERY_NORM)


@pytest.mark.parametrize("name", ["NoSuchModel", ""])
def test_a_class_that_transformers_lacks(original, name):
    edit_json(
        original / "config.json",
        lambda config: config.update(architectures=[name] if name else None),
    )
    refuse(original, f"transformers has no class {name or 'for it'}")


def test_a_converted_directory(tiny, tmp_path):
    directory = tmp_path / "converted"
    convert(tiny(), attention=QUERY_NORM).save_pretrained(directory)
    refuse(directory, "converted already; give the original")
    edit_json(directory / "config.json", lambda config: config["headwise"].update(format=99))
    refuse(directory, "by a newer headwise, in format 99; this version reads up to 3")
    with pytest.raises(ValueError, match="in format 99"):
        AutoConfig.from_pretrained(directory)
    edit_json(directory / "config.json", lambda config: config.pop("headwise"))
    refuse(directory, r"config\.json's 'headwise' is not understood")
