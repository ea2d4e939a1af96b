"""Sizes that no memory can hold are refused by name, before anything is read or built."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from headwise.bench import BenchRun
from headwise.commands.draw import DrawingRun
from headwise.commands.write_text import WritingRun
from headwise.data.images import load_images
from headwise.memory import check_memory
from headwise.recipes import RECIPES, recipe_run
from headwise.recipes.tune import SCHEDULES, TuningRun
from headwise.training.arguments import prepare

HUGE = 10**12
# The fields of recipes of which one alone can ask for more memory than there is.
SIZES = {
    "batch_size", "steps", "workers", "dim", "num_layers", "mlp_dim", "num_experts", "vocab_size",
    "sequence_length", "speed_contexts", "text_length", "image_size", "samples",
}  # fmt: skip


def test_what_fits_passes_and_what_does_not_is_named():
    check_memory(2**20, "x", size=3)
    with pytest.raises(ValueError, match=r"^a is 3, b is 5: x alone would need 1,048,576 GiB of"):
        check_memory(2**50, "x", a=3, b=5)


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        (recipe, field)
        for recipe in RECIPES
        for field in sorted(SIZES & {f.name for f in dataclasses.fields(recipe_run(recipe))})
    ],
)
def test_a_run_of_an_absurd_size(recipe, field, tmp_path):
    value = (HUGE,) if field == "speed_contexts" else HUGE
    with pytest.raises(ValueError, match=rf"{field} is \(?{HUGE}.*: .* GiB of memory"):
        prepare(recipe_run(recipe)(**{field: value, "output": tmp_path / "run"}))


@pytest.mark.parametrize("field", ["batch_size", "sequence_length", "steps"])
def test_tuning_at_an_absurd_size(field, tmp_path):
    default = SCHEDULES["small"]("model", tmp_path / "run")
    fields = vars(default) | {field: HUGE}
    if field == "steps":
        del fields["steps"]
        fields["routed"] = type(default.routed)(**vars(default.routed) | {"steps": HUGE})
    with pytest.raises(ValueError, match=rf"{field} is {HUGE}.*: .* GiB of memory"):
        prepare(TuningRun(**fields))


def test_other_commands_at_an_absurd_size(tmp_path):
    for field in ("count", "length"):
        with pytest.raises(ValueError, match=rf"{field} is {HUGE}.* GiB of memory"):
            WritingRun("model", tmp_path / "a.parquet", **{field: HUGE})
    for field in ("per_class", "scale"):
        with pytest.raises(ValueError, match=rf"{field} is {HUGE}.* GiB of memory"):
            DrawingRun(directory=Path("model"), output=tmp_path / "a.png", **{field: HUGE})
    for field in ("threads", "rounds"):
        with pytest.raises(ValueError, match=rf"{field} is {HUGE}.* GiB of memory"):
            BenchRun(**{field: HUGE})


def test_images_that_are_to_become_too_large(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("L", (5, 5)).save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match=r"image_size is 1000000: the images alone .* GiB"):
        load_images(str(tmp_path), image_size=10**6)
