"""What `headwise train dit` and `headwise draw` refuse, before anything long or written."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from headwise.models import DiT, DiTConfig
from headwise.recipes import dit, train
from tiny import llama

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("kornia", reason="kornia is not installed")
from headwise.commands.draw import DrawingRun, draw  # noqa: E402
from headwise.recipes.classifier import train_classifier  # noqa: E402
from headwise.recipes.vae import encoded, images_for, load_vae  # noqa: E402

SIDE = 6


@pytest.fixture(scope="module")
def pictures(bright_and_dark):
    """Grey images of 6 × 6 pixels."""
    return bright_and_dark(11, SIDE, SIDE)


@pytest.fixture(autouse=True)
def _nothing_is_trained(monkeypatch):
    """What is refused must be refused before a classifier is trained."""

    def train_nothing(*_: object) -> None:
        raise AssertionError("a classifier would be trained now")

    monkeypatch.setattr(dit, "train_classifier", train_nothing)


def vae_of(directory, *, channels: int = 3, depth: int = 2, latent: int = 4):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=channels, out_channels=channels, block_out_channels=(8,) * depth,
        norm_num_groups=4, latent_channels=latent, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
    )  # fmt: skip
    vae.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory, pictures):
    """Directories with models that are not what is asked for, or not quite."""
    root = tmp_path_factory.mktemp("models")
    llama().save_pretrained(root / "language")
    names = {"id2label": {0: "bright", 1: "dark"}}
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=1, **names)
    ResNetForImageClassification(resnet).save_pretrained(root / "resnet")
    for size, name in ((SIDE, "good"), (8, "large")):
        images, _ = dit.load_images(str(pictures), image_size=size)
        train_classifier(images, steps=1).save_pretrained(root / name)
    colour = dataclasses.replace(images, pixels=images.pixels.repeat(3, axis=1))
    train_classifier(colour, steps=1).save_pretrained(root / "colour")
    renamed = dataclasses.replace(images, classes=("dark", "bright"))
    train_classifier(renamed, steps=1).save_pretrained(root / "renamed")
    torch.manual_seed(0)
    for name, channels in {"pixels": 1, "latents": 4, "null": 1}.items():
        dropout = 0.0 if name == "null" else 0.1
        sizes = {"input_size": SIDE, "in_channels": channels, "class_dropout": dropout} | names
        DiT(DiTConfig.preset("dit-test", **sizes)).save_pretrained(root / name)
    vae_of(root / "vae")
    vae_of(root / "vae_16", latent=16)
    unet = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    unet.save_pretrained(root / "unet")
    (root / "empty").mkdir()
    for broken in ("no_json", "no_weights", "half"):
        shutil.copytree(root / "pixels", root / broken)
    (root / "no_json" / "config.json").write_text("{")
    (root / "no_weights" / "model.safetensors").unlink()
    weights = root / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])
    run = root / "run"
    shutil.copytree(root / "pixels", run / "models" / "dense-seed0")
    return root


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 5}, "image_size is 5, and images are 5 × 5; patches of 2 × 2 must divide"),
        ({"batch_size": 1000}, r"batch_size is 1000; it must be at most \d+, the examples"),
        ({"sampling_steps": 1001}, "sampling_steps is 1001; it must be at most 1000"),
        ({"samples": 1}, "samples is 1, which makes 2 images of 2 classes; it takes 4 or more"),
        ({"active_heads": 0.01}, "active_heads"),
        ({"classifier": "empty"}, r"classifier: .*empty holds no model \(no config"),
        ({"classifier": "run"}, "the run in it has .*dense-seed0"),
        ({"classifier": "language"}, r"language holds a language model \(.*'llama'\); it must be"),
        ({"classifier": "resnet"}, "holds an image classifier .*'resnet'.; it must be a TransNeXt"),
        (
            {"classifier": "pixels"},
            r"classifier .*pixels holds a DiT \(.*; .* `headwise train vit`",
        ),
        ({"classifier": "renamed"}, "classes dark, bright; the images have bright, dark, and"),
        ({"classifier": "large"}, "1 channels and side 8; these have 1 channels and side 6"),
        ({"classifier": "colour"}, "3 channels and side 8; these have 1 channels and side 6"),
        ({"vae": __file__}, "holds no AutoencoderKL: .* is a file"),
        ({"vae": "empty"}, "vae .*empty holds no AutoencoderKL: "),
        ({"vae": "language"}, "vae .*language holds no AutoencoderKL: .* it is of class None"),
        ({"vae": "unet"}, "vae .*unet holds no AutoencoderKL: .* class 'UNet2DModel'"),
        ({"vae": "vae", "image_size": 7}, "have side 7; vae .* takes multiples of 2, so give"),
        ({"vae": "vae", "classifier": "good"}, "1 channels and side 6; these have 3 channels"),
    ],
)
def test_what_cannot_be_trained_is_refused_at_once(changes, message, models, pictures, tmp_path):
    kinds = {"vae": str, "classifier": Path}
    places = {n: kinds[n](models / v) for n, v in changes.items() if n in kinds}
    run = dit.DiffusionRun(output=tmp_path / "run", data=str(pictures), batch_size=8)
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(run, **changes | places))
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_all_the_same_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(7):
            Image.new("L", (SIDE, SIDE), 99).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match=r"images to train on; .* not all of them the same"):
        dit.read(dit.DiffusionRun(data=str(tmp_path)))


def test_grey_images_are_colour_for_a_vae(models, pictures):
    images, _ = dit.load_images(str(pictures))
    vae = load_vae(str(models / "vae"))
    colour = images_for(vae, "vae", images)
    assert colour.pixels.shape == (len(images), 3, SIDE, SIDE)
    assert (colour.pixels == images.pixels).all()
    assert encoded(vae, colour).shape == (len(images), 4, SIDE // 2, SIDE // 2)


@pytest.mark.parametrize(("directory", "channels"), [("latents", 4), ("pixels", 1)])
def test_a_vae_of_other_latents_is_refused(directory, channels, models, tmp_path):
    run = DrawingRun(
        directory=models / directory, output=tmp_path / "grid.png", vae=str(models / "vae_16")
    )
    message = f"vae decodes 16 channels; the transformer draws {channels}, so it was trained with"
    with pytest.raises(ValueError, match=message):
        draw(run)


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("empty", r"holds no model \(no config.json\)"),
        ("run", "the run in it has .*dense-seed0"),
        ("language", r"language holds a language model \(.*\), not a DiT; `headwise eval"),
        ("no_json", "no_json.config.json cannot be read as a JSON object: "),
        ("no_weights", "cannot be loaded: "),
        ("half", "cannot be loaded: "),
        ("latents", "vae is None, and the model in .*latents draws 4 channels"),
        ("null", r"guidance_scale is 2\.0; .* no null class, so it must be 1"),
    ],
)
def test_directories_that_cannot_be_drawn_with_are_refused(directory, message, models, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(DrawingRun(directory=models / directory, output=tmp_path / "grid.png"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheduler": "dmp"}, "scheduler is 'dmp'; it must be one of 'ddim', 'ddpm', 'dpm'"),
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf; it must be at least 0"),
        ({"guidance_scale": -3.0}, "guidance_scale is -3.0; it must be at least 0"),
        ({"seed": -1}, r"seed is -1; it must lie in 0\.\.4294967295"),
        ({"output": "there.png"}, "output is .*there.png, which exists; choose another"),
        ({"output": "directory.png"}, "output is .*directory.png, which exists"),
        ({"output": "there.png/grid.png"}, r"but .*there\.png is a file; it must be a directory"),
    ],
)
def test_wrong_fields_of_a_sample_are_refused(changes, message, tmp_path):
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "there.png").write_text("mine")
    changes = {"output": "grid.png"} | changes
    changes["output"] = tmp_path / changes["output"]
    with pytest.raises(ValueError, match=message):
        DrawingRun(directory=tmp_path, **changes)
    assert (tmp_path / "there.png").read_text() == "mine"
