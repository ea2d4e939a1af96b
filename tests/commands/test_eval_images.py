"""headwise eval on images: scores worked by hand, classes that agree, what is refused."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from headwise import MoHConfig, convert
from headwise.cli import main
from headwise.commands.eval import score_models
from headwise.commands.eval.images import class_numbers, count_hits
from headwise.commands.eval.run import EvalRun
from headwise.data.images import load_images
from headwise.models import DiT, DiTConfig
from headwise.results.rows import read_csv
from tiny import llama

CLASSES = ("ant", "bee", "cow", "doe", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five images of each class, in colour, of 7 × 7 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(5):
            pixels = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories: a ViT of 11 × 11 pixels whose classes run backwards, and it with half and with
    all of its heads on."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    config = ViTConfig(
        image_size=11, patch_size=1, num_channels=3, hidden_size=24, intermediate_size=29,
        num_hidden_layers=2, num_attention_heads=6, initializer_range=0.5,
        id2label=dict(enumerate(reversed(CLASSES))),
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(root / "dense")
    for name, active in (("half", 3), ("all", 6)):
        attention = MoHConfig(shared=1, active=active, router="query_norm")
        convert(root / "dense", attention=attention).save_pretrained(root / name)
    for name in ("dense", "half", "all"):
        processor(11).save_pretrained(root / name)
    return root


def processor(side, **changes):
    return ViTImageProcessorPil(size={"height": side, "width": side}, **changes)


def ranks(directory, pictures):
    """For each image how many classes the model finds likelier than the right one."""
    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    prepare = AutoImageProcessor.from_pretrained(directory)
    known = list(model.config.id2label.values())
    found = []
    for file in sorted(pictures.rglob("*.png")):
        with Image.open(file) as image, torch.no_grad():
            logits = model(**prepare(image, return_tensors="pt")).logits[0]
        right = known.index(file.parent.name)
        found.append((logits > logits[right]).sum().item())
    return np.array(found)


def test_scores_are_those_worked_by_hand(models, pictures, tmp_path, capsys):
    paths = [str(models / name) for name in ("dense", "half", "all")]
    main(["eval", *paths, "--images", str(pictures), "-o", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    assert "35 images: all of" in printed
    assert max(map(len, printed.split("top-1")[1].split("saved")[0].splitlines())) <= 80
    rows = json.loads((tmp_path / "new" / "eval.json").read_text())["rows"]
    table = read_csv(tmp_path / "new" / "eval.csv")
    assert [row["value"] for row in table] == [str(row["value"]) for row in rows]
    assert [row["metric"] for row in rows] == ["top-1", "top-5", "heads on"] * 3
    for path, (top1, top5, share) in zip(paths, zip(*[iter(rows)] * 3, strict=True), strict=True):
        rank = ranks(path, pictures)
        for row, p in ((top1, (rank < 1).mean()), (top5, (rank < 5).mean())):
            assert row["value"] == pytest.approx(p)
            error = (p * (1 - p) / 34) ** 0.5
            assert row["standard_error"] == pytest.approx(error)
            assert f"{p:.3f} ±{error:.3f}" in printed
        assert share["standard_error"] is None
        assert {row["model"] for row in (top1, top5, share)} == {path}
        assert (top1["task"], top1["documents"]) == (pictures.name, 35)
        assert top1["device"]
    dense, half, every = (rows[i : i + 3] for i in (0, 3, 6))
    assert [x[2]["value"] for x in (dense, half, every)] == [1, 0.5, 1]
    values = [[row["value"] for row in x[:2]] for x in (dense, half, every)]
    assert values[0] == values[2] != values[1]
    assert 0 < values[0][1] < 1


def test_scores_do_not_depend_on_the_batch(models, pictures):
    run = EvalRun((str(models / "half"),), images=str(pictures))
    scores = [
        [row["value"] for row in score_models(dataclasses.replace(run, batch_size=size))]
        for size in (1, 3, 40)
    ]
    assert scores[0] == scores[1] == scores[2]


def test_hits_by_hand():
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)
    assert count_hits(logits, torch.tensor([0, 4, 5, 0])).tolist() == [2, 3]
    assert count_hits(logits[:, :3], torch.tensor([2, 0, 1, 1])).tolist() == [1, 4]


def test_digits_are_scored_where_training_held_them_out(tmp_path, capsys):
    pytest.importorskip("kornia", reason="kornia is not installed")
    from headwise.recipes.classifier import train_classifier
    from headwise.recipes.vit import VisionRun, VisionTask

    training, held_out = load_images()
    task = VisionTask(VisionRun(), training, held_out, held_out)
    model = train_classifier(training, steps=40)
    for saved in (model, task.processor):
        saved.save_pretrained(tmp_path / "model")
    top1, top5, _ = score_models(EvalRun((str(tmp_path / "model"),), images="digits"))
    assert "179 images: the held-out tenth of digits" in capsys.readouterr().out
    columns = task.score(model).columns
    assert columns["scored_images"] == 179
    want = [columns["top1"], columns["top5"]]
    assert [100 * top1["value"], 100 * top5["value"]] == pytest.approx(want)
    assert top1["value"] > 0.3


def test_what_is_scored(models, pictures, monkeypatch):
    run = EvalRun((str(models / "dense"),), images=str(pictures))

    def counted(**changes):
        return score_models(dataclasses.replace(run, **changes))[0]["documents"]

    assert counted(split="held-out") == 3
    assert counted(limit=4) == 4
    assert counted(limit=100) == 35
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        path = str(pictures / "ant" / "0.png")
        return Dataset.from_dict({"image": [path] * 20, "label": ["cow"] * 20})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [counted(images="animals", split=x) for x in (None, "validation")] == [20, 20]
    assert counted(images="animals:wild", split="held-out") == 2
    assert asked == [
        ("animals", None, "test"), ("animals", None, "validation"), ("animals", "wild", "train")
    ]  # fmt: skip


def config_of(*names):
    return ViTConfig(id2label=dict(enumerate(names)))


def test_classes_agree_by_name_or_by_number():
    named, nameless = config_of("ant", "bee", "cow"), config_of("LABEL_0", "LABEL_1", "LABEL_2")
    assert class_numbers("m", named, ("cow", "ant")).tolist() == [2, 0]
    assert class_numbers("m", named, ("0", "1", "2")).tolist() == [0, 1, 2]
    assert class_numbers("m", nameless, ("fox", "gnu", "ant")).tolist() == [0, 1, 2]
    # As directories are sorted.
    ten = config_of(*(f"LABEL_{i}" for i in range(11)))
    assert class_numbers("m", ten, tuple(sorted(map(str, range(11))))).tolist() == [
        0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"m, which knows no class fox; it knows ant, bee, cow"):
        class_numbers("m", named, ("ant", "fox"))
    for classes in (("fox", "gnu"), ("0", "1"), ("1", "2", "3")):
        with pytest.raises(ValueError, match=r"has 3 classes, 0\.\.2; the images have"):
            class_numbers("m", nameless, classes)


def test_wrong_fields_are_refused(models, pictures, tmp_path, fails):
    dense = models / "dense"
    for arguments, message in (
        ((), "tasks and images are both empty; give tasks to score language models"),
        (("--tasks", "piqa", "--images", pictures), "tasks and images are both given"),
        (("--images", pictures, "--num-fewshot", 2), "num_fewshot is 2; it goes with tasks, not"),
        (("--images", pictures, "--data", pictures), "it goes with tasks, not with images"),
        (("--tasks", "piqa", "--split", "test"), "split is test; it goes with images, not with"),
        (("--images", pictures, "--image-size", 0), "image_size is 0; it must be at least 1"),
        (("--images", pictures, "--split", "test"), "split is 'test'; here it must be 'held-out'"),
        (("--images", "digits", "--split", "all"), "split is 'all'; here it must be 'held-out'"),
        (("--images", tmp_path / "none"), "there is no such file or directory"),
    ):
        assert message in fails(2, "eval", dense, *arguments)


def test_wrong_images_are_refused(models, tmp_path, fails):
    dense = models / "dense"

    def message(**columns):
        kinds = {"image": datasets.Image(), "text": Value("string")}
        kinds["label"] = ClassLabel(names=list(CLASSES))
        features = Features({name: kinds[name] for name in columns})
        columns["image"] = [Image.new(mode, (7, 7)) for mode in columns["image"]]
        rows = Dataset.from_dict(columns, features=features)
        rows.to_parquet(tmp_path / "rows.parquet")
        return fails(2, "eval", dense, "--images", tmp_path / "rows.parquet")

    assert "which has no classes (a column 'label')" in message(image=["RGB"], text=["x"])
    said = message(image=["L", "L"], label=[0, 1])
    assert "dense, which takes 3 channels; images of 1 channels and 7 × 7 pixels" in said
    assert "row 1 of" in (said := message(image=["RGB", "RGB"], label=[0, -1]))
    assert "has label -1; it must lie in 0..6" in said


def test_wrong_models_are_refused(models, pictures, tmp_path, fails):
    def message(directory, *arguments):
        return fails(2, "eval", directory, *(arguments or ("--images", pictures)))

    assert "no/such/dir cannot be loaded: there is" in message("no/such/dir")
    (tmp_path / "run" / "models").mkdir(parents=True)
    (tmp_path / "run" / "models" / "moh-seed0").symlink_to(models / "half")
    assert "the run in it has" in message(tmp_path / "run")
    DiT(DiTConfig.preset("dit-test")).save_pretrained(tmp_path / "dit")
    expected = (
        "dit holds a DiT (model_type 'headwise_dit'), not an image classifier; `headwise draw`"
    )
    assert expected in message(tmp_path / "dit")
    llama().save_pretrained(tmp_path / "text")
    said = message(tmp_path / "text")
    assert "text holds a language model (model_type 'llama'), not an image classifier" in said
    said = message(models / "half", "--tasks", "piqa")
    assert "half holds an image classifier (model_type 'vit', converted), not a language" in said
    model = AutoModelForImageClassification.from_pretrained(models / "half")
    model.save_pretrained(tmp_path / "alone")
    said = message(tmp_path / "alone")
    assert "alone has no image processor that can be read; save one beside" in said
    # As they are, images are of another size than the model's.
    processor(11, do_resize=False).save_pretrained(tmp_path / "alone")
    said = message(tmp_path / "alone")
    assert "images of 3 channels and 7 × 7 pixels it does not take: Input image size (7*7)" in said
