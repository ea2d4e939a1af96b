"""Recipes: functions that return a complete, typed run. The command line overrides their fields."""

from collections.abc import Callable

from headwise.recipes.comparison import ComparisonRun
from headwise.recipes.lm import LanguageModelRun, lm
from headwise.recipes.masked import MaskedRun, masked
from headwise.recipes.multilingual import MultilingualRun, multilingual

RECIPES: dict[str, Callable[[], ComparisonRun]] = {
    "lm": lm,
    "multilingual": multilingual,
    "masked": masked,
}

__all__ = [
    "RECIPES", "LanguageModelRun", "MaskedRun", "MultilingualRun", "lm", "masked", "multilingual",
]  # fmt: skip
