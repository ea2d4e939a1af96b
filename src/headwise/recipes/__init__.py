"""Recipes: functions that return a complete, typed run. The command line overrides their fields."""

from collections.abc import Callable

from headwise.recipes.comparison import ComparisonRun
from headwise.recipes.dit import DiffusionRun, dit
from headwise.recipes.lm import LanguageModelRun, lm
from headwise.recipes.masked import MaskedRun, masked
from headwise.recipes.multilingual import MultilingualRun, multilingual
from headwise.recipes.vit import VisionRun, vit

RECIPES: dict[str, Callable[[], ComparisonRun]] = {
    "lm": lm,
    "multilingual": multilingual,
    "masked": masked,
    "vit": vit,
    "dit": dit,
}

__all__ = [
    "RECIPES",
    "DiffusionRun",
    "LanguageModelRun",
    "MaskedRun",
    "MultilingualRun",
    "VisionRun",
    "dit",
    "lm",
    "masked",
    "multilingual",
    "vit",
]  # fmt: skip
