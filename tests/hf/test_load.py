"""headwise.load: any directory of ours, of the class that was saved, in eval mode."""

from dataclasses import replace

import pytest
import torch
from conversions import MH_MOE, TWO_STAGE, tiny_dit
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

import headwise
from damage import edit_json, edit_weights
from headwise import MoHConfig, bitnet, convert
from headwise.models import (
    DiT,
    DiTConfig,
    MaskedConfig,
    MaskedModel,
    TransNeXtBackbone,
    TransNeXtConfig,
    TransNeXtForImageClassification,
)

HEADS = replace(TWO_STAGE, router_std=0.5)
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6}
IDS = {"input_ids": torch.randint(31, (2, 7))}
IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32)}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=6))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SMALL))


def masked():
    return MaskedModel(MaskedConfig(vocab_size=31, **SMALL))


TRANSNEXT = TransNeXtConfig.preset("moh-test")
OF_MASKED = {"pixel_values": torch.randn(2, 1, 8, 8), "input_ids": torch.randint(31, (2, 5))}
OF_DIT = {"x": torch.randn(2, 1, 8, 8), "t": torch.tensor([3, 700]), "y": torch.tensor([1, 10])}
MODELS = {
    "converted gpt2": (lambda: convert(gpt2(), attention=HEADS), IDS),
    "ternary gpt2": (lambda: convert(vit(), attention=HEADS, ternary=True), IMAGES),
    "packed vit": (lambda: bitnet.pack(convert(vit(), ternary=True)), IMAGES),
    "converted masked": (lambda: convert(masked(), attention=HEADS), OF_MASKED),
    "masked": (masked, OF_MASKED),
    "moh vit": (lambda: TransNeXtForImageClassification(TRANSNEXT), IMAGES),
    "backbone": (lambda: TransNeXtBackbone(TRANSNEXT), IMAGES),
    "dit": (lambda: DiT(DiTConfig.preset("moh-dit-test")), OF_DIT),
    "dense gpt2": (gpt2, IDS),
}


def tensors(output):
    values = output if isinstance(output, torch.Tensor) else list(output.values())
    flat = [values] if isinstance(values, torch.Tensor) else values
    return [x for v in flat for x in (v if isinstance(v, tuple) else [v]) if torch.is_tensor(x)]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_was_saved_comes_back_in_eval_mode(name, tmp_path):
    build, inputs = MODELS[name]
    model = build().eval()
    model.save_pretrained(tmp_path)
    again = headwise.load(tmp_path)
    assert type(again) is type(model)
    assert not again.training
    want, got = tensors(model(**inputs)), tensors(again(**inputs))
    assert len(want) == len(got) > 0
    assert all(map(torch.equal, want, got))


def test_experts_and_options_come_back(tiny, tmp_path):
    convert(tiny(), mlp=MH_MOE, every=2).save_pretrained(tmp_path)
    model = headwise.load(str(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert type(model.model.layers[1].mlp.layer) is headwise.MHMoE


def test_a_converted_model_of_diffusers_comes_back(tmp_path):
    model = tiny_dit()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="DiTTransformer2DModel of diffusers; load it with that"):
        headwise.load(tmp_path / "dense")
    convert(model, attention=MoHConfig(shared=1, active=3)).save_pretrained(tmp_path / "routed")
    again = headwise.load(tmp_path / "routed")
    assert type(again) is type(model)
    assert again.conversion == model.conversion


# diffusers hands the hub an argument that the hub has dropped.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`:UserWarning")
def test_it_loads_from_where_on_the_hub_the_options_say(tmp_path):
    kept = tmp_path / "models--someone--model"
    (kept / "refs").mkdir(parents=True)
    of_revision = {"main": convert(gpt2(), attention=HEADS), "other": vit()}
    for number, (revision, model) in enumerate(of_revision.items()):
        commit = str(number) * 40
        (kept / "refs" / revision).write_text(commit)
        model.save_pretrained(kept / "snapshots" / commit)
    in_part = convert(tiny_dit(), attention=MoHConfig(shared=1, active=3))
    in_part.save_pretrained(kept / "snapshots" / ("0" * 40) / "part")
    here = {"cache_dir": tmp_path, "local_files_only": True}
    for name, options in (("someone/model", here), (kept / "snapshots" / ("0" * 40), {})):
        assert type(headwise.load(name, **options)) is type(of_revision["main"])
        assert type(headwise.load(name, **options, subfolder="part")) is type(in_part)
    assert type(headwise.load("someone/model", **here, revision="other")) is type(vit())


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="path is a GPT2LMHeadModel; it must be a directory"):
        headwise.load(gpt2())
    for path, message in (("none", "there is no such directory"), ("file", "is a file; give")):
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=f"{path}.* {message}"):
            headwise.load(tmp_path / path)
    with pytest.raises(ValueError, match=r"holds no model \(no config.json\)"):
        headwise.load(tmp_path)
    gpt2().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda config: config.update(architectures=["NoModel"]))
    with pytest.raises(ValueError, match=r"cannot be loaded: .*no class NoModel"):
        headwise.load(tmp_path)


@pytest.mark.parametrize("name", ["converted gpt2", "dit"])
def test_a_weight_too_many_or_too_few_is_refused(name, tmp_path):
    MODELS[name][0]().save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update(surplus=torch.zeros(3)))
    with pytest.raises(ValueError, match="surplus"):
        headwise.load(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop("surplus"))
    lost = next(iter(load_file(tmp_path / "model.safetensors")))
    edit_weights(tmp_path, lambda weights: weights.pop(lost))
    with pytest.raises(ValueError, match=lost):
        headwise.load(tmp_path)
