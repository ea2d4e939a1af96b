"""Carrying out a run: text, models one after another, table, report. All of it resumes."""

from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel, default_data_collator, set_seed

from headwise.hf.trainer import SafeTrainer
from headwise.recipes.arguments import Stage, begin, training_arguments
from headwise.recipes.comparison import ComparisonRun, Variant
from headwise.recipes.directory import RunDirectory, write_whole
from headwise.recipes.results import Trained, measure, read_result, report, write_result
from headwise.recipes.text import Text, curve_blocks, read_text, training_blocks
from headwise.recipes.variants import build_model
from headwise.recipes.workers import side_by_side


def train(run: ComparisonRun) -> None:
    """Train all models of the run, compare them, and write results and report.

    Raises:
        ValueError: For data or an output directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    state, directory = begin(run)
    if state.is_main_process:
        print("Reading the text and training a tokenizer on it", flush=True)
    text = read_text(run)
    for variant in run.chosen():
        training_blocks(run, text, variant, run.seeds[0])
    curve_blocks(run, text)
    if state.is_main_process:
        directory.claim(run, text.fingerprint())
    state.wait_for_everyone()
    models = [(variant, seed) for variant in run.chosen() for seed in run.seeds]
    if run.workers > 1:
        trained = side_by_side(train_one, run, text, models)
    else:
        trained = [
            train_one(run, text, variant, seed, count=f"{index}/{len(models)}  ")
            for index, (variant, seed) in enumerate(models, start=1)
        ]
    if state.is_main_process:
        report(run, directory, text, trained)


def train_one(
    run: ComparisonRun, text: Text, variant: Variant, seed: int, *, count: str = ""
) -> Trained:
    """Train a model of the run, or read what a finished one came to. `count` precedes its name."""
    state, directory = PartialState(), RunDirectory(run.output)
    finished = directory.model(variant.name, seed)
    if (result := read_result(finished)) is not None:
        return result
    set_seed(seed)
    model = build_model(run, variant, vocab_size=len(text.tokenizer), seed=seed)
    stage = Stage(
        steps=run.steps,
        learning_rate=run.learning_rate,
        final_learning_rate=run.learning_rate / 10,
        warmup_steps=run.warmup_steps,
    )
    trainer = SafeTrainer(
        model=model,
        args=training_arguments(
            run,
            stage,
            seed=seed,
            state=state,
            checkpoints=directory.checkpoints(variant.name, seed),
            name=f"{directory.root.name}-{variant.name}-seed{seed}",
        ),
        train_dataset=training_blocks(run, text, variant, seed),
        eval_dataset=curve_blocks(run, text),
        data_collator=default_data_collator,
        title=f"{count}{variant.label}, seed {seed}",
        tokens_per_step=run.batch_size * run.sequence_length,
    )
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if run.resume else None)
    trained = measure(run, text, trainer, variant, seed)
    if state.is_main_process:
        write_whole(finished, lambda partial: _save(partial, trainer.model, text, trained))
    state.wait_for_everyone()
    return trained


def _save(directory: Path, model: PreTrainedModel, text: Text, trained: Trained) -> None:
    model.save_pretrained(directory)
    text.tokenizer.save_pretrained(directory)
    write_result(directory, trained)
