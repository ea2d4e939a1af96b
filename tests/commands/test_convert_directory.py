"""headwise convert: what it writes, what calibration prints, what it refuses and leaves alone."""

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
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from damage import contents
from headwise.cli import main
from headwise.commands.calibration import read_texts
from headwise.commands.convert import ConversionRun, convert_directory
from tiny import SIZES, llama, tokenizer

TEXT = " ".join(f"number {n} comes after {n - 1}." for n in range(400))
TEXTUAL = SIZES | {"vocab_size": 300, "max_position_embeddings": 512}


@pytest.fixture
def original(tmp_path):
    """A directory with a model and a tokenizer, and a text beside it."""
    directory = tmp_path / "original"
    for part in (llama(**TEXTUAL), tokenizer(TEXT)):
        part.save_pretrained(directory)
    (tmp_path / "text.txt").write_text(TEXT)
    return directory


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
        main(["convert", str(original), "-o", str(tmp_path / "other"), "--layers", "2", "1", "3"])
    assert "original: layers has 2, 3; the model has 2 layers" in capsys.readouterr().err


def test_calibration_names_heads_and_compares(original, tmp_path, capsys):
    options = {"shared": 2, "active": 4, "calibrate": (tmp_path / "text.txt",)}
    for by in ("query_norm", "loss"):
        run = ConversionRun(
            path=str(original), output=tmp_path / by, by=by, router="query_norm", **options
        )
        model = convert_directory(run)
        assert all(len(heads) == 2 for heads in model.conversion.attention.shared)
        printed = capsys.readouterr().out
        for name in ("all on", "the first ones shared", "calibrated"):
            assert name in printed
        assert "| calibrated |" in (tmp_path / by / "README.md").read_text()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / by)
        assert again.conversion == model.conversion


def test_with_a_text_routers_are_fitted_to_it(original, tmp_path, capsys):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    # Fewer than the heads that the router without parameters shares by default.
    options = ("--calibrate", str(text), str(other), "--active", "2")
    main(["convert", str(original), "-o", str(tmp_path / "new"), *options])
    printed = capsys.readouterr().out
    for file in (text, other):
        assert f"{file.name}: calibrated on pieces 1 to " in printed
    for row in ("all on", "fitted", "next token at 511 tokens", "prompt at 511"):
        assert row in printed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.conversion.attention.router == "fitted"
    assert sum(model.conversion.attention.active) == 4
    assert model.conversion.attention.shared == 0
    card = (tmp_path / "new" / "README.md").read_text()
    assert "| heads | text.txt | other.txt |" in card
    assert "\nMeasured on " in card
    assert ", float32; torch " in card
    assert "router\n`fitted`" in card
    alike = ConversionRun(
        str(original), tmp_path / "alike", active=4, allocate="alike", calibrate=(text,)
    )
    assert convert_directory(alike).conversion.attention.active == 4


@pytest.mark.parametrize(("longest", "calibrated", "compared"), [(512, 5, 2), (11, 32, 8)])
def test_calibration_takes_at_most_40_pieces_and_none_longer_than_the_model_was_made_for(
    original, tmp_path, capsys, longest, calibrated, compared
):
    llama(**TEXTUAL | {"max_position_embeddings": longest}).save_pretrained(original)
    tokens = len(AutoTokenizer.from_pretrained(original)(TEXT)["input_ids"])
    text = tmp_path / "text.txt"
    convert_directory(ConversionRun(str(original), tmp_path / "new", calibrate=(text,)))
    pieces = -(-tokens // min(longest, 512))
    assert (
        f"text.txt: calibrated on pieces 1 to {calibrated} of {pieces}, compared on the next "
        f"{compared}\n"
    ) in capsys.readouterr().out


def test_a_model_without_a_tokenizer_stays_without(original, tmp_path, capsys, fails):
    (original / "tokenizer.json").unlink()
    convert_directory(ConversionRun(str(original), tmp_path / "new"))
    assert "has no tokenizer, so" in " ".join(capsys.readouterr().out.split())
    said = fails(2, "generate", tmp_path / "new", "--prompt", "a")
    assert "new has no tokenizer, and text needs one; save one beside it" in said


def test_a_model_that_is_no_language_model(tmp_path):
    BertForMaskedLM(BertConfig(**TEXTUAL)).save_pretrained(tmp_path / "bert")
    convert_directory(ConversionRun(path=str(tmp_path / "bert"), output=tmp_path / "new"))
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "new").conversion
    assert "AutoModelForMaskedLM" in (tmp_path / "new" / "README.md").read_text()


def test_what_fills_masks_is_fitted_to_masked_text(tmp_path, capsys, fails):
    bert, text = tmp_path / "bert", tmp_path / "text.txt"
    BertForMaskedLM(BertConfig(**TEXTUAL | {"vocab_size": 302})).save_pretrained(bert)
    text.write_text(TEXT)
    options = ("convert", str(bert), "-o", str(tmp_path / "new"), "--calibrate", str(text))
    tokenizer(TEXT).save_pretrained(bert)
    assert "calibrate needs a tokenizer with a mask token" in fails(2, *options)
    tokenizer(TEXT, mask_token="<mask>", pad_token="<pad>").save_pretrained(bert)
    main([*options])
    assert "not timed: a model that fills masks" in capsys.readouterr().out
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "new")
    assert model.conversion.attention.router == "fitted"


def test_masked_batches_hold_no_token_that_is_to_be_predicted(tmp_path):
    text, masking = tmp_path / "text.txt", tokenizer(TEXT, mask_token="<mask>", pad_token="<pad>")
    text.write_text(TEXT)
    model = BertForMaskedLM(BertConfig(**TEXTUAL | {"vocab_size": 302}))
    for batch in read_texts([text], masking, model, "bert").calibration:
        asked = batch["labels"] != -100
        assert 0.05 < asked.float().mean() < 0.3
        seen = batch["input_ids"][asked]
        assert (seen == masking.mask_token_id).float().mean() > 0.6


def test_a_model_with_a_table_of_positions_is_timed_within_it(tmp_path, capsys):
    sizes = {"n_embd": 24, "n_head": 6, "n_layer": 2, "vocab_size": 300, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer(TEXT).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--active", "4", "--calibrate", str(tmp_path / "text.txt"))
    main(["convert", str(tmp_path / "gpt2"), "-o", str(tmp_path / "new"), *options])
    assert "next token at 63 tokens" in capsys.readouterr().out


def test_an_image_classifier_keeps_its_processor(tmp_path, capsys, fails):
    sizes = {key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
    config = ViTConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    convert_directory(ConversionRun(path=str(tmp_path / "vit"), output=tmp_path / "new"))
    assert "has no tokenizer" not in capsys.readouterr().out
    (tmp_path / "text.txt").write_text(TEXT)
    calibrate = ("-o", tmp_path / "no", "--calibrate", tmp_path / "text.txt")
    message = fails(2, "convert", tmp_path / "vit", *calibrate)
    assert "vit holds an image classifier (model_type 'vit'), not a language model" in message
    assert "headwise.fit(model, batches, config) in Python takes" in message
    assert not (tmp_path / "no").exists()
    assert AutoImageProcessor.from_pretrained(tmp_path / "new").size["height"] == 8
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "new").conversion


def test_a_learned_router_starts_with_gates_of_one(original, tmp_path):
    run = ConversionRun(path=str(original), output=tmp_path / "new", router="two_stage")
    model = convert_directory(run)
    gates = model.model.layers[0].self_attn.router(torch.randn(2, 5, 24)).weights
    assert torch.allclose(gates[gates != 0], torch.tensor(1.0))


def test_what_it_refuses(original, tmp_path, fails):
    before, new, text = contents(original), tmp_path / "new", tmp_path / "text.txt"

    def refusal(path, *options, output=new):
        return fails(2, "convert", path, "-o", output, *options)

    assert "there is no such directory" in refusal(tmp_path / "none")
    assert "there is no such directory, and" in refusal("no/none")
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refusal(tmp_path / "empty")
    assert "which exists" in refusal(original, output=original)
    for options, message in (
        (("--shared", 5, "--active", 4), "shared is 5, more than active = 4"),
        (("--active", 7), "layer 0: active is 7; it must lie in 1..6"),
        (("--shared", -1), "shared is -1; it must be an int of at least 0"),
        (("--calibrate", "none.txt"), "there is no file"),
        (("--router", "fitted"), "there is no text to fit it to; give one with --calibrate"),
        (("--calibrate", tmp_path), "a directory; it must be text files"),
        (("--allocate", "alike"), "allocate is 'alike', and no router is fitted"),
        (("--by", "loss"), "by is 'loss', and no shared heads are chosen"),
        (("--active", 1), "lower shared or raise active (by default shared is 0.5)"),
    ):
        assert message in refusal(original, *options)
    for content, message in (
        (b"too short", "text.txt, of 9 tokens in all; it must have more than 512"),
        (b"\n", "text.txt, which holds no text"),
        (b"\xff", "text.txt is not UTF-8 text"),
    ):
        text.write_bytes(content)
        assert message in refusal(original, "--calibrate", text)
    Dataset.from_dict({"input_ids": [[1, 2, 3]]}).to_parquet(str(tmp_path / "one.parquet"))
    said = refusal(original, "--calibrate", tmp_path / "one.parquet")
    assert "one.parquet, of 3 tokens in all; it must have 2 rows" in said
    text.write_text(TEXT)
    small = tmp_path / "small"
    llama(**TEXTUAL | {"vocab_size": 200}).save_pretrained(small)
    (original / "tokenizer.json").rename(small / "tokenizer.json")
    assert "has no tokenizer" in refusal(original, "--calibrate", text)
    assert "its tokenizer does not match it" in refusal(small, "--calibrate", text)
    (small / "tokenizer.json").rename(original / "tokenizer.json")
    (small / "model.safetensors").unlink()
    assert "small cannot be loaded: Error no file named model.safetensors" in refusal(small)
    assert not new.exists()
    main(["convert", str(original), "-o", str(new)])
    assert "converted already" in refusal(new, output=tmp_path / "twice")
    assert contents(original) == before
