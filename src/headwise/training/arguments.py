"""How a run is set up: its processes, its directory, and what transformers' Trainer is told."""

from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from headwise.hf.checkpointing import checkpointing_arguments
from headwise.memory import check_memory
from headwise.training.directory import RunDirectory
from headwise.training.fields import Stage, TrainingRun, warn_if_emulated


def prepare(run: TrainingRun) -> tuple[PartialState, RunDirectory]:
    """The processes of a run and its directory; nothing is written yet.

    Raises:
        ValueError: If the processes, the trackers or the directory cannot be used for the run.
    """
    # Without the hint, processes on CPUs do not find each other.
    state = PartialState(cpu=not torch.accelerator.is_available())
    _check_batch(run, state)
    _check_trackers(run.report_to)
    directory = RunDirectory(run.output)
    if state.is_main_process:
        directory.check(run)
    return state, directory


def training_arguments(
    run: TrainingRun,
    stage: Stage,
    *,
    checkpoints: Path,
    name: str,
    seed: int,
    state: PartialState,
    eval_on_start: bool = False,
    activation_checkpointing: bool = False,
) -> TrainingArguments:
    """Arguments of Trainer for a stage of a run."""
    on_cpu = state.device.type == "cpu"
    warn_if_emulated(run.precision, state.device.type)
    share = run.batch_size // state.num_processes
    at_a_time = run.device_batch_size or share
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
        **checkpointing_arguments(activation_checkpointing),
    )


def _check_batch(run: TrainingRun, state: PartialState) -> None:
    """Whether processes share a step's examples evenly, and hold what they compute at a time."""
    if run.batch_size % state.num_processes:
        raise ValueError(
            f"batch_size is {run.batch_size}; {state.num_processes} processes must divide it"
        )
    share, at_a_time = run.batch_size // state.num_processes, run.device_batch_size
    if at_a_time is not None and (at_a_time < 1 or share % at_a_time):
        raise ValueError(
            f"device_batch_size is {at_a_time}; it must divide a process's share of batch_size, "
            f"{share}"
        )
    numbers, fields = run.least_numbers()
    least_bytes = 4 * (at_a_time or share) * numbers
    check_memory(least_bytes, "what a step computes", batch_size=run.batch_size, **fields)


def _check_trackers(names: tuple[str, ...]) -> None:
    available = get_available_reporting_integrations()
    for name in names:
        if name not in available:
            raise ValueError(
                f"report_to names {name!r}; it must be a tracker that is installed, of which there "
                f"are here: {', '.join(available) or 'none'}"
            )
