"""The recipes, a file each: the fields of its run above, `read(run)` and the task below.

A recipe is imported when it is asked for, so that one does without what another needs.
"""

from importlib import import_module
from typing import NamedTuple

from headwise.ops.choice import look_up
from headwise.training.comparison import ComparisonRun

__all__ = ["RECIPES", "Recipe", "recipe_run", "train"]


class Recipe(NamedTuple):
    """What is told of a recipe before it is imported.

    Attributes:
        run: Name of its run's class, in the module that has the recipe's name.
        summary: What it trains, in a line.
    """

    run: str
    summary: str


RECIPES = {
    "lm": Recipe(
        "LanguageModelRun",
        "Five small models on the text that every Python carries, in minutes on 2 cores.",
    ),
    "multilingual": Recipe(
        "MultilingualRun",
        "Four small models of several languages, balanced by a temperature (needs --data).",
    ),
    "masked": Recipe(
        "MaskedRun", "Four small masked models of handwritten digits and their captions."
    ),
    "vit": Recipe(
        "VisionRun",
        "TransNeXt and MoH-ViT, small ones, on handwritten digits or images of your own.",
    ),
    "dit": Recipe(
        "DiffusionRun",
        "DiT and MoH-DiT, small ones, that draw handwritten digits or images of your own.",
    ),
}


def recipe_run(name: str) -> type[ComparisonRun]:
    """The class of a recipe's run; its fields default to a demo of minutes on 2 cores.

    Raises:
        ValueError: If there is no such recipe, with the nearest name.
    """
    recipe = look_up("recipe", name, RECIPES)
    return getattr(import_module(f"headwise.recipes.{name}"), recipe.run)


def train(run: ComparisonRun) -> None:
    """Train the models of a run, compare them, and write results and report.

    The data are read by `read` of the module that defines the run's class.

    Raises:
        ValueError: For data or an output directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    # Imported here: help works without what trains.
    from headwise.training.train import train as train_with

    train_with(run, import_module(type(run).__module__).read)
