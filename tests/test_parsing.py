"""Help of a command: its everyday fields first, the others under the class that declares them."""

import dataclasses
import re

import pytest

from headwise.cli import main
from headwise.recipes import RECIPES, recipe_run
from headwise.recipes.lm import LanguageModelRun
from headwise.recipes.tune import TuningRun


@pytest.fixture
def boxes(capsys):
    """What help shows: the options in each box, by its title."""

    def shown(*command: str) -> dict[str, list[str]]:
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        parts = re.split(r"^╭─ (.*?) ─+╮$", capsys.readouterr().out, flags=re.MULTILINE)[1:]
        # An option stands at the edge of its box, what is said of it farther in.
        option = re.compile(r"^│ (?:-\w \S+, )?--([\w.-]+)", re.MULTILINE)
        found = (option.findall(box) for box in parts[1::2])
        return dict(zip(parts[::2], found, strict=True))

    return shown


def options(names: tuple[str, ...]) -> list[str]:
    return [name.replace("_", "-") for name in names]


def test_everyday_fields_of_a_recipe_come_first(boxes):
    shown = boxes("train", "lm")
    assert list(shown) == ["options", "Language-Model options", "Text options", "Layered options",
                           "Comparison options", "Training options"]  # fmt: skip
    assert len(LanguageModelRun.everyday) == 10
    assert shown["options"] == options(LanguageModelRun.everyday)
    for title, field in {
        "Language-Model options": "shared-heads", "Text options": "sequence-length",
        "Layered options": "num-layers", "Training options": "weight-decay",
    }.items():  # fmt: skip
        assert field in shown[title]
    assert all(shown.values())


def test_everyday_fields_of_tuning_come_first(boxes):
    shown = boxes("tune")
    print(shown)
    assert shown["options"] == options(TuningRun.everyday)
    assert "Training options" in shown


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_field_of_a_recipe_is_shown_once(boxes, recipe):
    shown = [option for box in boxes("train", recipe).values() for option in box]
    fields = options([field.name for field in dataclasses.fields(recipe_run(recipe))])
    assert sorted(shown) == sorted(fields)
