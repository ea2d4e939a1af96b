"""`headwise train dit` and `headwise draw` on small images; what they refuse."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from headwise.analysis.image_records import from_png
from headwise.analysis.records import from_json
from headwise.data.images import load_images
from headwise.models import DiT
from headwise.recipes import train
from headwise.results.rows import read_csv

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("kornia", reason="kornia is not installed")
from headwise.commands.draw import DrawingRun, draw
from headwise.recipes.classifier import train_classifier
from headwise.recipes.dit import DiffusionRun, read
from headwise.training.comparison import Training
from headwise.training.pictures import in_grid, sample_grid
from headwise.training.train import trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def pictures(bright_and_dark):
    """Grey images of 8 × 8 pixels."""
    return bright_and_dark(60, 8, 8)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, pictures):
    directory = tmp_path_factory.mktemp("classifier")
    training, _ = load_images(str(pictures))
    train_classifier(training, steps=40).save_pretrained(directory)
    return directory


def run_of(output, pictures, classifier, **changes):
    fields = {
        "steps": 6, "batch_size": 5, "eval_every": 3, "save_every": 2, "log_every": 1,
        "samples": 11, "sampling_steps": 3, "classifier": classifier,
    }  # fmt: skip
    return DiffusionRun(output=output, data=str(pictures), **fields | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures, classifier):
    output = tmp_path_factory.mktemp("runs") / "dit"
    run = run_of(
        output, pictures, classifier, models=("moh_75",), steps=400, batch_size=16,
        eval_every=400, save_every=400, sampling_steps=20, averaging=0.9, learning_rate=3e-3,
        warmup_steps=10,
    )  # fmt: skip
    train(run)
    return run


@pytest.fixture
def drawer(finished):
    """The directory of the model that was trained."""
    return finished.output / "models" / "moh_75-seed0"


def test_it_draws_bright_and_dark(finished):
    (row,) = read_csv(finished.output / "results.csv")
    assert row["model"] == "moh_75"
    assert float(row["recognised"]) == 100
    assert 0 <= float(row["precision_of_samples"]) <= 1
    assert float(row["fid"]) >= 0
    assert (row["unit"], row["samples"], row["real_images"]) == ("image", "22", "108")
    assert float(row["active_heads"]) < 1
    assert "Diffusion transformers" in (finished.output / "report.html").read_text()


def test_what_is_saved_is_the_average(finished, drawer):
    saved = DiT.from_pretrained(drawer).state_dict()
    checkpoint = finished.output / "checkpoints" / "moh_75-seed0" / "checkpoint-400"
    trained = DiT.from_pretrained(checkpoint).state_dict()
    assert not torch.equal(saved["final_layer.linear.weight"], trained["final_layer.linear.weight"])
    assert torch.equal(saved["positions"], trained["positions"])


def test_what_is_scored_on_the_way_is_the_average(pictures, classifier, tmp_path):
    run = run_of(tmp_path / "run", pictures, classifier, averaging=0.5, steps=3)
    trainer = trainer_of(run, read(run), Training(run.dense(), seed=0))
    trainer.train()
    average = [x.clone() for x in trainer.average.shadow_params]
    for parameter in trainer.model.parameters():
        parameter.data += 1
    now = [x.clone() for x in trainer.model.parameters()]
    assert not any(map(torch.equal, now, average))
    with trainer.kept_weights():
        assert all(map(torch.equal, trainer.model.parameters(), average))
    assert all(map(torch.equal, trainer.model.parameters(), now))


def test_loads_are_counted_for_each_class(finished, drawer):
    task = read(finished)
    assert [len(x) for x in task.values] == [108, 6, 6]
    (_, curve), whole = task.datasets(task.run.variants()[0], 0), task.values[1]
    assert [x["pixel_values"].tolist() for x in curve] == whole.tolist()
    assert not {x.tobytes() for x in whole} & {x.tobytes() for x in task.values[2]}
    model = DiT.from_pretrained(drawer).eval()
    loads = task._loads(model).head_loads()
    assert list(loads.by_domain) == ["bright", "dark"]
    # An image is one document, however many times it is seen.
    documents = np.bincount(task.test.labels).tolist()
    assert list(loads.difference.documents.values()) == documents
    active = [b.active_heads for b in model.config.budgets]
    for layers in loads.by_domain.values():
        assert [sum(layer) for layer in layers] == pytest.approx(active)


def test_what_it_draws_is_shown(finished):
    (model,) = from_json((finished.output / "record.json").read_text()).models
    assert model.samples.rows == ["bright", "dark"]
    with Image.open(finished.output / "pictures" / "moh_75-samples.png") as image:
        grid = np.asarray(image)
    assert (grid == from_png(model.samples.png)).all()
    # Eight of the eleven that are measured, each pixel eight wide, a gap of two around.
    assert grid.shape == (2 * (64 + 4), 8 * (64 + 4))
    assert grid[2:66].mean() > grid[70:134].mean() + 50
    (last,) = model.images[0].maps
    assert last.grid == [4, 4]
    assert {len(on) for on in last.heads_on} == {6}


def test_large_samples_are_made_smaller():
    images = np.zeros((6, 3, 128, 128), dtype=np.uint8)
    images[4:] = 250
    grid = from_png(sample_grid(images, ["a", "b", "c"]).png)
    assert grid.shape == (3 * 68, 2 * 68, 3)
    assert [grid[r * 68 + 34, 34].tolist() for r in range(3)] == [[0] * 3, [0] * 3, [250] * 3]


def test_resumed_is_never_stopped(tmp_path, pictures, classifier):
    whole, halved = (
        run_of(tmp_path / name, pictures, classifier, models=("moh_75",), flip=0.5)
        for name in ("whole", "halved")
    )
    train(whole)
    train(halved)
    # As after a kill at step 5: the last checkpoint is that of step 4.
    shutil.rmtree(halved.output / "models")
    shutil.rmtree(halved.output / "checkpoints" / "moh_75-seed0" / "checkpoint-6")
    train(dataclasses.replace(halved, resume=True))
    states = [
        DiT.from_pretrained(run.output / "models" / "moh_75-seed0").state_dict()
        for run in (whole, halved)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm"])
def test_a_grid_has_a_row_a_class(drawer, tmp_path, scheduler):
    output, options = tmp_path / "grid.png", {"steps": 20, "scheduler": scheduler}
    draw(DrawingRun(directory=drawer, output=output, per_class=3, scale=2, **options))
    with Image.open(output) as grid:
        assert grid.size == (3 * (2 * 8 + 4), 2 * (2 * 8 + 4))
        pixels = np.asarray(grid).astype(float)
    rows = [pixels[r * 20 + 2 : r * 20 + 18, 2:18].mean() for r in (0, 1)]
    assert rows[0] > rows[1] + 50


def test_seeds_repeat_a_grid_and_choose_its_images(drawer, tmp_path):
    grids = []
    # Two grids are drawn in two parts, the third in one.
    for name, classes, seed in (("a", (0, 1), 0), ("b", (0, 1), 0), ("c", (1,), 60)):
        run = DrawingRun(
            directory=drawer, output=tmp_path / f"{name}.png", classes=classes, per_class=60,
            steps=3, seed=seed,
        )  # fmt: skip
        draw(run)
        with Image.open(run.output) as image:
            grids.append(np.asarray(image).astype(int))
    assert (grids[0] == grids[1]).all()
    # The same seeds and class beside other batch mates, up to rounding.
    assert abs(grids[2] - grids[0][len(grids[2]) :]).max() <= 1


def test_grid_by_hand():
    images = np.array([10, 20, 30, 40], dtype=np.uint8).reshape(4, 1, 1, 1)
    grid = np.asarray(in_grid(images, columns=2, scale=2))
    assert grid.shape == (12, 12)
    assert grid[2:4, 2:4].tolist() == [[10, 10], [10, 10]]
    assert (grid[2, 8], grid[8, 2], grid[8, 8]) == (20, 30, 40)
    assert (grid[:2] == 255).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "xs"}, "unknown size 'xs'; did you mean 's'|did you mean 'xl'"),
        ({"averaging": 1.0}, "averaging is 1.0; it must lie in 0..1, below 1"),
        ({"class_dropout": 0.0}, "guidance_scale is 1.5; with class_dropout 0 it must be 1"),
        ({"guidance_scale": -3.0}, "guidance_scale is -3.0; it must be at least 0"),
        ({"samples": 0}, "samples is 0; it must be at least 1"),
        ({"flip": -1.0}, "flip is -1.0; it must lie in 0..1"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DiffusionRun(), **changes)


def test_what_cannot_be_sampled_from_is_refused(finished, drawer, tmp_path, classifier):
    output = tmp_path / "grid.png"
    with pytest.raises(ValueError, match=r"no config.json\); the run in it has .*moh_75-seed0"):
        draw(DrawingRun(directory=finished.output, output=output))
    with pytest.raises(ValueError, match=r"an image classifier .*, not a DiT; `headwise eval"):
        draw(DrawingRun(directory=classifier, output=output))
    for changes, message in (
        ({"classes": (7,)}, r"classes holds 7; the model knows 0..1 \(bright to dark\)"),
        ({"classes": ("drak",)}, "unknown class 'drak'; did you mean 'dark'"),
        ({"steps": 1001}, "steps is 1001; it must be at most 1000"),
        ({"vae": str(tmp_path)}, "holds no AutoencoderKL"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(DrawingRun(directory=drawer, output=output, per_class=1, **changes))
    with pytest.raises(ValueError, match=r"must be the name of a \.png file"):
        DrawingRun(directory=classifier, output=tmp_path / "grid.gif")
    assert not output.exists()


def test_a_classifier_of_other_classes_is_refused(finished, tmp_path, pictures):
    training, _ = load_images(None)
    other = tmp_path / "other"
    train_classifier(training, steps=1).save_pretrained(other)
    with pytest.raises(ValueError, match=r"knows the classes zero, one.*; the images have bright"):
        read(dataclasses.replace(finished, classifier=other))
    with pytest.raises(ValueError, match=r"classifier: .*nowhere holds no model"):
        read(dataclasses.replace(finished, classifier=tmp_path / "nowhere"))
