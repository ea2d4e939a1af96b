"""headwise convert: what it writes, what calibration prints, what it refuses and leaves alone."""

import hashlib

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from headwise.cli import main
from headwise.data.text import Domain, train_tokenizer
from headwise.recipes.conversion import ConversionRun, convert_directory

TEXT = " ".join(f"number {n} comes after {n - 1}." for n in range(400))
SIZES = {
    "vocab_size": 300, "hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2,
    "num_attention_heads": 6, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def original(tmp_path):
    """A directory with a model and a tokenizer, and a text beside it."""
    torch.manual_seed(0)
    directory = tmp_path / "original"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    bpe = train_tokenizer([Domain("text", {"a": TEXT}, {})], vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(directory)
    (tmp_path / "text.txt").write_text(TEXT)
    return directory


def contents(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


def test_the_converted_directory_loads_and_says_what_it_is(original, tmp_path, capsys):
    before = contents(original)
    main(["convert", str(original), "-o", str(tmp_path / "new"), "--shared", "2", "--active", "4"])
    assert contents(original) == before
    assert "all 2 layers: heads=6: 2 shared + 2 of 4 routed = 4 active" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.conversion.attention.router == "query_norm"
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("number 7")["input_ids"]
    card = (tmp_path / "new" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "2 shared + 2 of 4" in card
    assert str(tmp_path) not in card


def test_calibration_names_heads_and_compares(original, tmp_path, capsys):
    options = {"shared": 2, "active": 4, "calibrate": tmp_path / "text.txt"}
    for by in ("query_norm", "loss"):
        run = ConversionRun(path=str(original), output=tmp_path / by, by=by, **options)
        model = convert_directory(run)
        assert all(len(heads) == 2 for heads in model.conversion.attention.shared)
        printed = capsys.readouterr().out
        for name in ("all on", "the first ones shared", "calibrated"):
            assert name in printed
        assert "| calibrated |" in (tmp_path / by / "README.md").read_text()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / by)
        assert again.conversion == model.conversion


def test_a_model_that_is_no_language_model(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    convert_directory(ConversionRun(path=str(tmp_path / "bert"), output=tmp_path / "new"))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "new").conversion
    assert "AutoModelForMaskedLM" in (tmp_path / "new" / "README.md").read_text()


def test_a_learned_router_starts_with_gates_of_one(original, tmp_path):
    run = ConversionRun(path=str(original), output=tmp_path / "new", router="two_stage")
    model = convert_directory(run)
    gates = model.model.layers[0].self_attn.router(torch.randn(2, 5, 24)).weights
    assert torch.allclose(gates[gates != 0], torch.tensor(1.0))


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, arguments)])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_what_it_refuses(original, tmp_path, capsys):
    before, new = contents(original), tmp_path / "new"
    text = tmp_path / "text.txt"
    assert "there is no directory" in refusal(capsys, tmp_path / "none", "-o", new)
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refusal(capsys, tmp_path / "empty", "-o", new)
    assert "which exists" in refusal(capsys, original, "-o", original)
    assert "shared is 5, more than active = 4" in refusal(
        capsys, original, "-o", new, "--shared", 5, "--active", 4
    )
    assert "layer 0: active_heads is 7" in refusal(capsys, original, "-o", new, "--active", 7)
    assert "there is no file" in refusal(capsys, original, "-o", new, "--calibrate", "none.txt")
    text.write_text("too short")
    assert "more than 256" in refusal(capsys, original, "-o", new, "--calibrate", text)
    text.write_text(TEXT)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 200})).save_pretrained(tmp_path / "small")
    (original / "tokenizer.json").rename(tmp_path / "small" / "tokenizer.json")
    assert "has no tokenizer" in refusal(capsys, original, "-o", new, "--calibrate", text)
    message = refusal(capsys, tmp_path / "small", "-o", new, "--calibrate", text)
    assert "its tokenizer does not match it" in message
    (tmp_path / "small" / "tokenizer.json").rename(original / "tokenizer.json")
    (tmp_path / "small" / "model.safetensors").unlink()
    assert "holds no model" in refusal(capsys, tmp_path / "small", "-o", new)
    assert not new.exists()
    main(["convert", str(original), "-o", str(new)])
    capsys.readouterr()
    assert "converted already" in refusal(capsys, new, "-o", tmp_path / "twice")
    assert contents(original) == before
