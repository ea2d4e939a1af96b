"""The fields that every training run has, and the checks of a run's fields."""

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from headwise.data.text import is_text
from headwise.memory import check_memory
from headwise.ops.choice import check_choice
from headwise.ops.fields import Positive, check
from headwise.ops.native.levels import levels_here

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run: AdamW, linear warmup, cosine down to the final learning rate.

    Attributes:
        steps: Optimizer steps; 0 leaves the stage out.
        learning_rate: Peak.
        final_learning_rate: At the last step.
        warmup_steps: Steps of linear warmup.
    """

    steps: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps"):
            check_at_least(0, name, getattr(self, name))
        check("learning_rate", self.learning_rate, Positive)
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate is {self.final_learning_rate}; it must lie between 0 and "
                f"learning_rate = {self.learning_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A run that trains one model or several.

    Attributes:
        output: Directory of the run.
        data: What to train on; None for what is embedded.
        batch_size: Examples of a step, over all processes.
        device_batch_size: Examples that a process computes at a time; None for all of its share.
        weight_decay: Of AdamW.
        precision: "fp32", or "bf16" for autocast.
        log_every: Steps between two points of the training curve.
        eval_every: Steps between two points of the validation curve.
        save_every: Steps between two checkpoints.
        report_to: Trackers of transformers' Trainer: tensorboard, trackio, wandb, …
        resume: Go on with the run in the output directory.
        overwrite: Delete the run in the output directory and start anew.
    """

    output: Path
    data: str | None = None
    batch_size: int
    device_batch_size: int | None = None
    weight_decay: float = 0.1
    precision: Precision = "fp32"
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    report_to: tuple[str, ...] = field(default=())
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, Precision)
        for name in ("batch_size", "log_every", "eval_every", "save_every"):
            check_at_least(1, name, getattr(self, name))
        order, steps = 8 * self.batch_size * self.total_steps, self.total_steps
        check_memory(order, "the order of the examples", batch_size=self.batch_size, steps=steps)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; it must be at least 0 and finite"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both set; choose one")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a model, over all stages."""
        raise NotImplementedError

    def least_numbers(self) -> tuple[int, dict[str, object]]:
        """How many numbers a step keeps of an example at least, and the fields that say so."""
        return 1, {}


def check_at_least(least: int, name: str, value: int) -> None:
    """Raises ValueError if the field of that name is less."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


def warn_if_emulated(precision: Precision, device: str) -> None:
    """Warn where bfloat16 is asked of a processor on which torch has no fast products of it.

    These are x86 processors before AVX-512.
    """
    if precision == "bf16" and device == "cpu" and list(levels_here()) == ["avx2"]:
        warnings.warn(
            "precision is 'bf16', whose products torch computes some fifty times slower than those "
            "of 'fp32' on a processor without AVX-512, as this one; take 'fp32'",
            stacklevel=2,
        )


def check_guidance(scale: float) -> None:
    """Raises ValueError if a guidance_scale is below 0, infinite or not a number."""
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance_scale is {scale}; it must be at least 0 and finite")


def check_batch_size(batch_size: int, examples: int) -> None:
    """Raises ValueError if a step would see examples twice."""
    if batch_size > examples:
        raise ValueError(
            f"batch_size is {batch_size}; it must be at most {examples}, the examples to train on"
        )


def check_seed(name: str, value: int) -> None:
    """Raises ValueError if numpy could not be seeded with the field of that name."""
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} is {value}; it must lie in 0..{2**32 - 1}")


def check_text(name: str, text: str) -> None:
    """Raises ValueError if nothing could encode the field of that name: for lone surrogates."""
    if not is_text(text):
        raise ValueError(f"{name} is {text!r}, which is no UTF-8 text")
