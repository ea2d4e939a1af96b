"""`headwise train vit` on small images: trained, measured, saved, resumed; what it refuses."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from headwise.analysis.image_records import from_png
from headwise.analysis.records import from_json
from headwise.data.images import halve_images, load_images
from headwise.recipes import train
from headwise.recipes.vit import VisionRun, read
from headwise.results.rows import read_csv

pytest.importorskip("kornia", reason="kornia is not installed")


@pytest.fixture(scope="module")
def pictures(bright_and_dark):
    """Images of 8 × 8 pixels, in colour."""
    return bright_and_dark(60, 8, 8, 3)


def run_of(output, pictures, **changes):
    fields = {"steps": 6, "batch_size": 5, "eval_every": 3, "save_every": 2, "log_every": 1}
    return dataclasses.replace(
        VisionRun(), output=output, data=str(pictures), warmup_steps=1, **fields | changes
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    run = run_of(tmp_path_factory.mktemp("runs") / "vit", pictures, steps=40, eval_every=20)
    train(run)
    return run


def test_both_learn_bright_from_dark(finished):
    rows = {row["model"]: row for row in read_csv(finished.output / "results.csv")}
    assert list(rows) == ["dense", "moh_75"]
    for row in rows.values():
        assert float(row["top1"]) == 100
        assert row["scored_images"] == "6"  # of 120 a tenth is held out, and half of it scored
        assert (row["unit"], row["seen"]) == ("image", str(40 * 5))
        assert float(row["flops"]) == pytest.approx(float(row["flops_counted"]), rel=0.1)
    assert (rows["dense"]["active_heads"], rows["moh_75"]["active_heads"]) == ("1.0", "0.75")
    assert "Image classifiers" in (finished.output / "report.html").read_text()


@pytest.fixture
def directory(finished):
    """Of the model with routed heads."""
    return finished.output / "models" / "moh_75-seed0"


def test_a_model_classifies_pictures_as_people_have_them(directory, pictures):
    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory)
    for name in ("bright", "dark"):
        with Image.open(pictures / name / "3.png") as image:
            inputs = processor(image, return_tensors="pt")
        with torch.no_grad():
            label = model(**inputs).logits.argmax().item()
        assert (model.config.id2label[label], model.config.label2id[name]) == (name, label)


def test_loads_are_counted_for_each_class(finished, directory):
    task = read(finished)
    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    heads = task.score(model).heads
    assert list(heads.by_domain) == ["bright", "dark"]
    assert list(map(len, heads.shared_heads)) == [2, 2, 2, 2, 3, 3]
    for layers in heads.by_domain.values():
        assert [sum(layer) for layer in layers] == pytest.approx([3, 3, 3, 3, 6, 6])
    # An image is a document, of the batches of five each has both classes.
    held_out = np.bincount(task.test.labels).tolist()
    assert list(heads.difference.documents.values()) == held_out
    for layer, tested in enumerate(heads.difference.layers):
        by_class = np.array([layers[layer] for layers in heads.by_domain.values()])
        assert tested.effects == pytest.approx(100 * np.ptp(by_class, axis=0))
    page = (finished.output / "report.html").read_text()
    assert "permutations of the domains of whole images (bright" in page
    rows = read_csv(finished.output / "heads.csv")
    assert len(rows) == 4 * 4 + 2 * 8
    assert all(0 < float(row["p_value"]) <= 1 for row in rows)


def test_pictures_of_heads_by_class_and_patch(finished):
    record = from_json((finished.output / "record.json").read_text())
    dense, routed = record.models
    assert dense.images == []
    assert [image.domain for image in routed.images] == ["bright", "dark"]
    _, test = halve_images(load_images(finished.data)[1])
    for label, image in enumerate(routed.images):
        first = int((test.labels == label).argmax())
        assert (from_png(image.png) == np.moveaxis(test.pixels[first], 0, -1)).all()
        # The last layer of each stage: 8 × 8 patches, then a quarter of them each.
        assert [(m.layer, m.grid) for m in image.maps] == [(1, [8, 8]), (3, [4, 4]), (5, [2, 2])]
        for patches, shared, active in zip(image.maps, (2, 2, 3), (3, 3, 6), strict=True):
            for on in patches.heads_on:
                assert len(on) == active
                assert on[:shared] == list(range(shared))
    names = {path.name for path in (finished.output / "pictures").iterdir()}
    parts = ("last-layer", "all-layers", "patches-1", "patches-3", "patches-5")
    assert names == {f"moh_75-{part}.png" for part in parts}


def test_resumed_is_never_stopped(tmp_path, pictures):
    whole, halved = (
        run_of(tmp_path / name, pictures, models=("moh_75",), rand_augment=9, mixup=0.5)
        for name in ("whole", "halved")
    )
    train(whole)
    train(halved)
    # As after a kill at step 5: the last checkpoint is that of step 4.
    for left in ("models", "results.csv", "record.json", "report.html", "figure.png"):
        path = halved.output / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(halved.output / "checkpoints" / "moh_75-seed0" / "checkpoint-6")
    train(dataclasses.replace(halved, resume=True))
    states = [
        load_file(run.output / "models" / "moh_75-seed0" / "model.safetensors")
        for run in (whole, halved)
    ]
    assert_close(*states, rtol=0, atol=0)


def test_models_are_chosen_by_other_images_than_are_scored(pictures, tmp_path):
    task = read(run_of(tmp_path, pictures))
    _, curve = task.datasets(task.run.variants()[0], 0)
    chosen_by = {x["pixel_values"].numpy().tobytes() for x in curve}
    scored = {x.tobytes() for x in task.test.pixels}
    assert (len(chosen_by), len(scored)) == (6, 6)
    assert not chosen_by & scored
    assert "held out: 6 for the validation curve, 6 for the scores" in task.facts()["Number"]
    swapped = dataclasses.replace(task, validation=task.test, test=task.validation)
    assert swapped.fingerprint() != task.fingerprint()


def test_images_of_which_one_is_held_out_are_refused(bright_and_dark, tmp_path):
    with pytest.raises(ValueError, match=r"data holds out 1 image; .* at least 20 images"):
        read(run_of(tmp_path / "run", bright_and_dark(7, 8, 8)))


def test_patches_follow_the_images(pictures, tmp_path):
    task = read(run_of(tmp_path, pictures))
    assert task.config(None).patch_size == 1
    assert task.config(None).image_size == 8
    large = read(run_of(tmp_path, pictures, image_size=32))
    assert large.config(None).patch_size == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "smal"}, "unknown size 'smal'; did you mean 'small'"),
        ({"active_heads": 1.5}, "active_heads is 1.5; it must lie in 0..1"),
        ({"image_size": 0}, "image_size is 0; it must be at least 1"),
        ({"cutmix": 0.9, "mixup": 0.2}, "together they must be at most 1"),
        ({"models": ("moh_50",)}, "models is 'moh_50'; it must be one of dense, moh_75"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VisionRun(), **changes)


def test_a_batch_that_would_repeat_images_is_refused(tmp_path, pictures):
    with pytest.raises(ValueError, match=r"batch_size is 109; it must be at most 108, the"):
        read(run_of(tmp_path / "run", pictures, batch_size=109))


def test_a_class_without_images_is_refused(tmp_path, pictures):
    data = tmp_path / "data"
    for name in ("bright", "dark", "empty"):
        (data / name).mkdir(parents=True)
        for file in (pictures / name).glob("*.png"):
            (data / name / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="no image to train on of empty"):
        read(run_of(tmp_path / "run", data))
    (data / "empty").rmdir()
    for file in (data / "dark").iterdir():
        file.unlink()
    (data / "dark").rmdir()
    with pytest.raises(ValueError, match="has one class"):
        read(run_of(tmp_path / "run", data))
