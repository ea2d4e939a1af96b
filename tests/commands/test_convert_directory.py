"""headwise convert: what it writes, what calibration prints, what it refuses and leaves alone."""

import hashlib

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from headwise.cli import main
from headwise.commands.convert import ConversionRun, convert_directory
from headwise.data.text import Domain, train_tokenizer

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


def test_layers_that_are_not_named_stay_as_they_are(original, tmp_path, capsys):
    new, text = str(tmp_path / "new"), str(tmp_path / "text.txt")
    main(["convert", str(original), "-o", new, "--layers", "1", "--calibrate", text])
    assert "\nlayer 1: heads=6" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(new)
    routed = [hasattr(layer.self_attn, "router") for layer in model.model.layers]
    assert routed == [False, True]
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(original), "-o", str(tmp_path / "other"), "--layers", "2"])
    assert "layers has 2; the model has 2 layers" in capsys.readouterr().err


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


@pytest.mark.parametrize(("longest", "calibrated", "compared"), [(512, 10, 4), (11, 48, 16)])
def test_calibration_takes_at_most_64_pieces_and_none_longer_than_the_model_was_made_for(
    original, tmp_path, capsys, longest, calibrated, compared
):
    config = LlamaConfig(**SIZES | {"max_position_embeddings": longest})
    LlamaForCausalLM(config).save_pretrained(original)
    tokens = len(AutoTokenizer.from_pretrained(original)(TEXT)["input_ids"])
    run = ConversionRun(str(original), tmp_path / "new", calibrate=tmp_path / "text.txt")
    convert_directory(run)
    pieces = -(-tokens // min(longest, 256))
    assert (
        f"calibrated on pieces 1 to {calibrated} of the text's {pieces}, compared on the next "
        f"{compared}\n"
    ) in capsys.readouterr().out


def test_a_model_without_a_tokenizer_stays_without(original, tmp_path, capsys):
    (original / "tokenizer.json").unlink()
    convert_directory(ConversionRun(str(original), tmp_path / "new"))
    assert "has no tokenizer, so" in " ".join(capsys.readouterr().out.split())
    assert "new has no tokenizer, and text needs one; save one beside it" in refusal(
        capsys, tmp_path / "new", "--prompt", "a", command="generate"
    )


def test_a_model_that_is_no_language_model(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    convert_directory(ConversionRun(path=str(tmp_path / "bert"), output=tmp_path / "new"))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "new").conversion
    assert "AutoModelForMaskedLM" in (tmp_path / "new" / "README.md").read_text()


def test_an_image_classifier_keeps_its_processor(tmp_path, capsys):
    sizes = {key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    config = ViTConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    convert_directory(ConversionRun(path=str(tmp_path / "vit"), output=tmp_path / "new"))
    assert "has no tokenizer" not in capsys.readouterr().out
    (tmp_path / "text.txt").write_text(TEXT)
    message = refusal(
        capsys, tmp_path / "vit", "-o", tmp_path / "no", "--calibrate", tmp_path / "text.txt"
    )
    assert "vit holds an image classifier (model_type 'vit'), not a language model" in message
    assert "headwise.calibrate(model, batches, config) in Python takes" in message
    assert not (tmp_path / "no").exists()
    assert AutoImageProcessor.from_pretrained(tmp_path / "new").size["height"] == 8
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "new").conversion


def test_a_learned_router_starts_with_gates_of_one(original, tmp_path):
    run = ConversionRun(path=str(original), output=tmp_path / "new", router="two_stage")
    model = convert_directory(run)
    gates = model.model.layers[0].self_attn.router(torch.randn(2, 5, 24)).weights
    assert torch.allclose(gates[gates != 0], torch.tensor(1.0))


def refusal(capsys, *arguments, command="convert"):
    with pytest.raises(SystemExit) as end:
        main([command, *map(str, arguments)])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_what_it_refuses(original, tmp_path, capsys):
    before, new = contents(original), tmp_path / "new"
    text = tmp_path / "text.txt"
    assert "there is no directory" in refusal(capsys, tmp_path / "none", "-o", new)
    assert "there is no such directory, and" in refusal(capsys, "no/none", "-o", new)
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refusal(capsys, tmp_path / "empty", "-o", new)
    assert "which exists" in refusal(capsys, original, "-o", original)
    assert "shared is 5, more than active = 4" in refusal(
        capsys, original, "-o", new, "--shared", 5, "--active", 4
    )
    assert "layer 0: active is 7; it must lie in 1..6" in refusal(
        capsys, original, "-o", new, "--active", 7
    )
    calibrate = ("-o", new, "--calibrate", text)
    assert "shared is -1; it must be an int of at least 0" in refusal(
        capsys, original, "-o", new, "--shared", "-1"
    )
    assert "there is no file" in refusal(capsys, original, *calibrate[:-1], "none.txt")
    text.write_text("too short")
    assert "text.txt, of 9 tokens in all; it must have more than 256" in refusal(
        capsys, original, *calibrate
    )
    text.write_text("\n")
    assert "text.txt, which holds no text" in refusal(capsys, original, *calibrate)
    text.write_bytes(b"\xff")
    assert "text.txt is not UTF-8 text" in refusal(capsys, original, *calibrate)
    Dataset.from_dict({"input_ids": [[1, 2, 3]]}).to_parquet(str(tmp_path / "one.parquet"))
    assert "one.parquet, of 3 tokens in all; it must have 2 rows" in refusal(
        capsys, original, *calibrate[:-1], tmp_path / "one.parquet"
    )
    text.write_text(TEXT)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 200})).save_pretrained(tmp_path / "small")
    (original / "tokenizer.json").rename(tmp_path / "small" / "tokenizer.json")
    assert "has no tokenizer" in refusal(capsys, original, *calibrate)
    message = refusal(capsys, tmp_path / "small", *calibrate)
    assert "its tokenizer does not match it" in message
    (tmp_path / "small" / "tokenizer.json").rename(original / "tokenizer.json")
    (tmp_path / "small" / "model.safetensors").unlink()
    assert "holds no model" in refusal(capsys, tmp_path / "small", "-o", new)
    assert not new.exists()
    main(["convert", str(original), "-o", str(new)])
    capsys.readouterr()
    assert "converted already" in refusal(capsys, new, "-o", tmp_path / "twice")
    assert contents(original) == before
