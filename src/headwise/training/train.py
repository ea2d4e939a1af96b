"""Carrying out a comparison: data, models one after another, table, report. All of it resumes."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import default_data_collator

from headwise.results.files import write_whole
from headwise.training.arguments import prepare, training_arguments
from headwise.training.comparison import ComparisonRun, Task, Variant
from headwise.training.directory import RunDirectory
from headwise.training.record import Trained, measure, read_result, report, write_result
from headwise.training.trainer import SafeTrainer
from headwise.training.workers import side_by_side

Run = TypeVar("Run", bound=ComparisonRun)


def train(run: Run, read: Callable[[Run], Task]) -> None:
    """Train all models of the run, compare them, and write results and report.

    Args:
        run: What to train.
        read: Reads the data of the run. It is called when the output directory is known to be free.

    Raises:
        ValueError: For data or an output directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    state, directory = prepare(run)
    if run.workers > 1 and state.num_processes > 1:
        raise ValueError(
            f"workers is {run.workers}, and there are {state.num_processes} processes that train "
            "each model together; give --workers 1"
        )
    task = read(run)
    task.check()
    main = state.is_main_process
    with directory.held_by(run, task.fingerprint()) if main else nullcontext():
        state.wait_for_everyone()
        trained = _train_all(run, task)
        if main:
            report(run, task, directory, trained)


def _train_all(run: ComparisonRun, task: Task) -> list[Trained]:
    models = [(variant, seed) for variant in run.selected() for seed in run.seeds]
    if run.workers > 1:
        return side_by_side(train_one, run, task, models)
    return [
        train_one(run, task, variant, seed, count=f"{index}/{len(models)}  ")
        for index, (variant, seed) in enumerate(models, start=1)
    ]


def train_one(
    run: ComparisonRun, task: Task, variant: Variant, seed: int, *, count: str = ""
) -> Trained:
    """Train a model of the run, or read what a finished one came to. `count` precedes its name."""
    state = PartialState()
    directory = RunDirectory(run.output)
    finished = directory.model(variant.name, seed)
    if (result := read_result(finished)) is not None:
        return result
    set_seed(seed)
    model = task.model(variant, seed)
    training, validation = task.datasets(variant, seed)
    trainer = task.trainer(
        model=model,
        args=training_arguments(
            run,
            run.stage,
            seed=seed,
            state=state,
            checkpoints=directory.checkpoints(variant.name, seed),
            name=f"{directory.root.name}-{variant.name}-seed{seed}",
        ),
        train_dataset=training,
        eval_dataset=validation,
        data_collator=default_data_collator,
        title=f"{count}{variant.label}, seed {seed}",
        per_step=run.batch_size * task.length,
        unit=task.unit,
    )
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if run.resume else None)
    trained = measure(run, task, trainer, variant, seed)
    if state.is_main_process:
        write_whole(finished, lambda partial: _save(partial, task, trainer, trained))
    state.wait_for_everyone()
    return trained


def _save(directory: Path, task: Task, trainer: SafeTrainer, trained: Trained) -> None:
    trainer.model.save_pretrained(directory)
    task.processor.save_pretrained(directory)
    write_result(directory, trained)
