"""Recipes: functions that return a complete, typed run. The command line overrides their fields."""

from collections.abc import Callable

from headwise.recipes.lm import LanguageModelRun, lm

RECIPES: dict[str, Callable[[], LanguageModelRun]] = {"lm": lm}

__all__ = ["RECIPES", "LanguageModelRun", "lm"]
