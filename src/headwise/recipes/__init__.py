"""Recipes: functions that return a complete, typed run. The command line overrides their fields."""

from collections.abc import Callable

from headwise.recipes.comparison import ComparisonRun
from headwise.recipes.lm import LanguageModelRun, lm
from headwise.recipes.masked import MaskedRun, masked

RECIPES: dict[str, Callable[[], ComparisonRun | MaskedRun]] = {"lm": lm, "masked": masked}


def carry_out(run: ComparisonRun | MaskedRun) -> None:
    """Train the models of a run, compare them, and write down what came out.

    Raises:
        ValueError: For data or an output directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    # Not above: help on a recipe's fields shall not wait for what trains.
    if isinstance(run, MaskedRun):
        from headwise.recipes.masked_training import train_masked

        train_masked(run)
    else:
        from headwise.recipes.train import train

        train(run)


__all__ = ["RECIPES", "LanguageModelRun", "MaskedRun", "carry_out", "lm", "masked"]
