"""What transformers' Trainer is told, the same for every recipe."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from headwise.data.text import is_text
from headwise.hf.checkpointing import checkpointing_arguments
from headwise.memory import check_memory
from headwise.ops.choice import check_choice
from headwise.recipes.directory import RunDirectory

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
        if not 0 <= self.final_learning_rate <= self.learning_rate < float("inf"):
            raise ValueError(
                f"final_learning_rate is {self.final_learning_rate}; it must lie between 0 and "
                f"learning_rate = {self.learning_rate}"
            )
        if self.learning_rate == 0:
            raise ValueError("learning_rate is 0; it must be above 0")


def check_training(run: Any) -> None:
    """Refuse fields that every run has and that no training could be carried out with.

    Raises:
        ValueError: Naming the field.
    """
    check_choice("precision", run.precision, Precision)
    for name in ("batch_size", "log_every", "eval_every", "save_every"):
        check_at_least(1, name, getattr(run, name))
    steps = run.steps if hasattr(run, "steps") else run.dense.steps + run.routed.steps
    order = 8 * run.batch_size * steps
    check_memory(order, "the order of the examples", batch_size=run.batch_size, steps=steps)
    if not 0 <= run.weight_decay < math.inf:
        raise ValueError(f"weight_decay is {run.weight_decay}; it must be at least 0 and finite")
    if run.resume and run.overwrite:
        raise ValueError("resume and overwrite are both set; choose one")


def check_at_least(least: int, name: str, value: int) -> None:
    """Raises ValueError if the field of that name is less."""
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")


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


def training_arguments(
    run: Any,
    stage: Stage,
    *,
    checkpoints: Path,
    name: str,
    seed: int,
    state: PartialState,
    eval_on_start: bool = False,
) -> TrainingArguments:
    """Arguments of Trainer for a stage of a run, whose fields have the names of the recipes'."""
    on_cpu = state.device.type == "cpu"
    share = run.batch_size // state.num_processes
    at_a_time = getattr(run, "device_batch_size", None) or share
    return TrainingArguments(
        output_dir=str(checkpoints),
        run_name=name,
        max_steps=stage.steps,
        per_device_train_batch_size=at_a_time,
        per_device_eval_batch_size=at_a_time,
        gradient_accumulation_steps=share // at_a_time,
        learning_rate=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": stage.final_learning_rate / stage.learning_rate},
        weight_decay=run.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=run.precision == "bf16",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=run.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=run.eval_every,
        eval_on_start=eval_on_start,
        prediction_loss_only=True,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=run.save_every,
        save_total_limit=2,
        report_to=list(run.report_to) or "none",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        seed=seed,
        **checkpointing_arguments(getattr(run, "activation_checkpointing", False)),
    )


def begin(run: Any) -> tuple[PartialState, RunDirectory]:
    """The processes of a run and its directory; nothing is written yet.

    Raises:
        ValueError: If the processes, the trackers or the directory do not do.
    """
    # Without the hint, processes on CPUs do not find each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    _check_batch(run, state)
    workers = getattr(run, "workers", 1)
    if workers > 1 and state.num_processes > 1:
        raise ValueError(
            f"workers is {workers}, and there are {state.num_processes} processes that train each "
            "model together; give --workers 1"
        )
    _check_trackers(run.report_to)
    directory = RunDirectory(run.output)
    if state.is_main_process:
        directory.check(run)
    return state, directory


def _check_batch(run: Any, state: PartialState) -> None:
    """Whether processes share a step's examples evenly, and hold what they compute at a time."""
    if run.batch_size % state.num_processes:
        raise ValueError(
            f"batch_size is {run.batch_size}; {state.num_processes} processes must divide it"
        )
    share = run.batch_size // state.num_processes
    at_a_time = getattr(run, "device_batch_size", None)
    if at_a_time is not None and (at_a_time < 1 or share % at_a_time):
        raise ValueError(
            f"device_batch_size is {at_a_time}; it must divide a process's share of batch_size, "
            f"{share}"
        )
    # Of text every layer keeps what came in for the backward pass; of images one channel is enough.
    sizes = [x for x in ("sequence_length", "dim", "num_layers") if hasattr(run, x)]
    side = getattr(run, "image_size", None) or 1
    numbers = max(math.prod(getattr(run, x) for x in sizes), side**2)
    fields = {x: getattr(run, x) for x in ("batch_size", *sizes)}
    fields |= {"image_size": side} if side > 1 else {}
    check_memory(4 * (at_a_time or share) * numbers, "what a step computes", **fields)


def _check_trackers(names: tuple[str, ...]) -> None:
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise ValueError(
                f"report_to names {name!r}; it must be a tracker that is installed, of which there "
                f"are here: {', '.join(available) or 'none'}"
            )
