"""Carrying out a comparison: data, models one after another, table, report. All of it resumes."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import TrainerCallback, TrainerState, default_data_collator

from headwise.errors import DivergedError
from headwise.results.files import write_whole
from headwise.training.arguments import prepare, training_arguments
from headwise.training.comparison import ComparisonRun, Task, Training
from headwise.training.directory import RunDirectory
from headwise.training.measures import early, measures
from headwise.training.protocol import Outcome, fair, plain
from headwise.training.record import Trained, measure, read_result, report, write_result
from headwise.training.timetable import say_how_long
from headwise.training.trainer import SafeTrainer
from headwise.training.workers import Result, Train, side_by_side

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
        outcome = _carry_out(run, task)
        if main:
            report(run, task, directory, *outcome)


def _carry_out(run: ComparisonRun, task: Task) -> Outcome:
    if run.protocol == "plain":
        return plain(run, partial(_train_all, run, task, train_one))
    say_how_long(run, partial(trainer_of, run, task))
    return fair(run, partial(_train_all, run, task, try_one))


def _train_all(
    run: ComparisonRun, task: Task, train: Train[Result], trainings: Sequence[Training]
) -> list[Result]:
    """What each training came to; those that are finished already are read."""
    directory = RunDirectory(run.output)
    saved = {training.name: read_result(directory.model(training.name)) for training in trainings}
    left = [training for training in trainings if saved[training.name] is None]
    if run.workers > 1:
        new = side_by_side(train, run, task, left)
    else:
        new = [
            train(run, task, training, f"{index}/{len(left)}  ")
            for index, training in enumerate(left, start=1)
        ]
    results: dict[str, Any] = saved | {x.name: result for x, result in zip(left, new, strict=True)}
    return [results[training.name] for training in trainings]


def try_one(run: ComparisonRun, task: Task, training: Training, count: str = "") -> Trained | None:
    """As `train_one`; None where the learning rate is too high."""
    try:
        return train_one(run, task, training, count)
    except DivergedError as error:
        print(f"{count}{training.label}: {error}", flush=True)
        return None


def train_one(run: ComparisonRun, task: Task, training: Training, count: str = "") -> Trained:
    """Train a model of the run, and save it. `count` precedes its name."""
    state = PartialState()
    finished = RunDirectory(run.output).model(training.name)
    trainer = trainer_of(run, task, training, count)
    if run.early_steps is not None:
        trainer.add_callback(_EarlyScore(trainer, task, run.early_steps))
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if run.resume else None)
    trained = measure(run, task, trainer, training)
    if state.is_main_process:
        write_whole(finished, lambda partial: _save(partial, task, trainer, trained))
    state.wait_for_everyone()
    return trained


def trainer_of(run: ComparisonRun, task: Task, training: Training, count: str = "") -> SafeTrainer:
    """Of a new model, on the data of its seed."""
    variant, seed, rate = training
    directory = RunDirectory(run.output)
    at_rate = run if rate is None else dataclasses.replace(run, learning_rate=rate)
    set_seed(seed)
    model = task.model(variant, seed)
    examples, validation = task.datasets(variant, seed)
    return task.trainer(
        model=model,
        args=training_arguments(
            run,
            at_rate.stage,
            seed=seed,
            state=PartialState(),
            checkpoints=directory.checkpoints(training.name),
            name=f"{directory.root.name}-{training.name}",
        ),
        train_dataset=examples,
        eval_dataset=validation,
        data_collator=default_data_collator,
        title=f"{count}{training.label}",
        per_step=run.batch_size * task.length,
        unit=task.unit,
    )


class _EarlyScore(TrainerCallback):
    """Scores a model on its way, into Trainer's history, which its checkpoints have."""

    def __init__(self, trainer: SafeTrainer, task: Task, steps: int):
        self.trainer, self.task, self.steps = trainer, task, steps

    def on_step_end(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        if state.global_step == self.steps:
            with self.trainer.kept_weights():
                columns = self.task.score(self.trainer.model).columns
            self.trainer.model.train()
            self.trainer.log({early(x.key): columns[x.key] for x in measures(columns)})


def _save(directory: Path, task: Task, trainer: SafeTrainer, trained: Trained) -> None:
    trainer.model.save_pretrained(directory)
    task.processor.save_pretrained(directory)
    write_result(directory, trained)
