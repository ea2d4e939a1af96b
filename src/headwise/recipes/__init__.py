"""Recipes: functions that return a complete, typed run. The command line overrides their fields."""

from collections.abc import Callable

from headwise.recipes.comparison import ComparisonRun
from headwise.recipes.lm import LanguageModelRun, lm
from headwise.recipes.masked import MaskedRun, masked

RECIPES: dict[str, Callable[[], ComparisonRun]] = {"lm": lm, "masked": masked}

__all__ = ["RECIPES", "LanguageModelRun", "MaskedRun", "lm", "masked"]
