"""Carrying out a run: data, models one after another, table, report. All of it resumes."""

from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState
from transformers import default_data_collator, set_seed

from headwise.hf.trainer import SafeTrainer
from headwise.recipes.arguments import Stage, begin, training_arguments
from headwise.recipes.comparison import ComparisonRun, Variant
from headwise.recipes.directory import RunDirectory
from headwise.recipes.results import Trained, measure, read_result, report, write_result
from headwise.recipes.task import Task
from headwise.recipes.workers import side_by_side
from headwise.results.files import write_whole


def train(run: ComparisonRun) -> None:
    """Train all models of the run, compare them, and write results and report.

    Raises:
        ValueError: For data or an output directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    state, directory = begin(run)
    task = run.read()
    task.check()
    main = state.is_main_process
    with directory.claim(run, task.fingerprint()) if main else nullcontext():
        state.wait_for_everyone()
        trained = _train_all(task)
        if main:
            report(task, directory, trained)


def _train_all(task: Task) -> list[Trained]:
    run = task.run
    models = [(variant, seed) for variant in run.chosen() for seed in run.seeds]
    if run.workers > 1:
        return side_by_side(train_one, task, models)
    return [
        train_one(task, variant, seed, count=f"{index}/{len(models)}  ")
        for index, (variant, seed) in enumerate(models, start=1)
    ]


def train_one(task: Task, variant: Variant, seed: int, *, count: str = "") -> Trained:
    """Train a model of the run, or read what a finished one came to. `count` precedes its name."""
    run, state = task.run, PartialState()
    directory = RunDirectory(run.output)
    finished = directory.model(variant.name, seed)
    if (result := read_result(finished)) is not None:
        return result
    set_seed(seed)
    model = task.model(variant, seed)
    training, validation = task.datasets(variant, seed)
    stage = Stage(
        steps=run.steps,
        learning_rate=run.learning_rate,
        final_learning_rate=run.final_learning_rate,
        warmup_steps=run.warmup_steps,
    )
    trainer = task.trainer(
        model=model,
        args=training_arguments(
            run,
            stage,
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
    trained = measure(task, trainer, variant, seed)
    if state.is_main_process:
        write_whole(finished, lambda partial: _save(partial, task, trainer, trained))
    state.wait_for_everyone()
    return trained


def _save(directory: Path, task: Task, trainer: SafeTrainer, trained: Trained) -> None:
    trainer.model.save_pretrained(directory)
    task.processor.save_pretrained(directory)
    write_result(directory, trained)
