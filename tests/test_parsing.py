"""Help of a command: its everyday fields first, the others under the class that declares them."""

import dataclasses
import re

import pytest

from headwise.cli import main
from headwise.recipes import RECIPES, recipe_run
from headwise.recipes.lm import LanguageModelRun
from headwise.recipes.tune import TuningRun

# A box has lines around it where the terminal can draw them.
TITLE = re.compile(r"^(?:╭─)? ((?:\S+ )?options|positional arguments) [ ─╮]*$", re.MULTILINE)
# An option stands at the edge of its box, what is said of it farther in.
OPTION = re.compile(r"^[│ ] (?:-\w \S+, )?--(\w[\w.-]*)", re.MULTILINE)


@pytest.fixture
def boxes(capsys):
    """The options in each box of a help, by the box's title."""

    def shown(*command: str) -> dict[str, list[str]]:
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        _, *parts = TITLE.split(capsys.readouterr().out)
        return dict(zip(parts[::2], map(OPTION.findall, parts[1::2]), strict=True))

    return shown


def options(*names: str) -> list[str]:
    return [name.replace("_", "-") for name in names]


def test_everyday_fields_of_a_recipe_come_first(boxes):
    (title, everyday), *others = boxes("train", "lm").items()
    assert (title, everyday) == ("options", options(*LanguageModelRun.everyday))
    assert len(everyday) == 11
    # Each other box, and an option that its class declares.
    declared = {
        "Language-Model options": "shared-heads", "Text options": "sequence-length",
        "Layered options": "num-layers", "Comparison options": "warmup-steps",
        "Training options": "weight-decay",
    }  # fmt: skip
    assert [title for title, _ in others] == list(declared)
    assert all(declared[title] in box for title, box in others)


def test_everyday_fields_of_tuning_come_first(boxes):
    shown = boxes("tune")
    path, *everyday = options(*TuningRun.everyday)
    assert (path, shown["options"]) == ("path", everyday)
    assert list(shown) == [
        "positional arguments", "options", "dense options", "routed options", "Tuning options",
        "Training options",
    ]  # fmt: skip
    assert "seed" in shown["Tuning options"]
    assert "weight-decay" in shown["Training options"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_field_of_a_recipe_is_shown_once(boxes, recipe):
    shown = [option for box in boxes("train", recipe).values() for option in box]
    fields = options(*(field.name for field in dataclasses.fields(recipe_run(recipe))))
    assert sorted(shown) == sorted(fields)
