"""Carrying out a tuning run: the original measured, every head on, heads routed. It resumes."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, default_data_collator, set_seed

from headwise.errors import reading
from headwise.files import write_manifest, write_whole
from headwise.hf import restore
from headwise.hf.auto import Routed
from headwise.hf.distillation import RecoveringTrainer
from headwise.recipes import recovery
from headwise.recipes.arguments import Stage, begin, training_arguments
from headwise.recipes.card import model_card
from headwise.recipes.directory import RunDirectory, fingerprint
from headwise.recipes.loading import check_length, load_causal_lm, load_tokenizer
from headwise.recipes.recovery import Point
from headwise.recipes.tuning import TuningRun
from headwise.recipes.tuning_text import held_out_blocks, load_tokens, training_blocks

_POINTS_FILE = "recovery.json"


class _Setting(NamedTuple):
    """What the stages share."""

    run: TuningRun
    directory: RunDirectory
    state: PartialState
    tokenizer: PreTrainedTokenizerBase | None
    held_out: list[dict[str, torch.Tensor]]
    original: Any


def tune(run: TuningRun) -> None:
    """Tune the model of the run, and write how much of the original's quality it has.

    Raises:
        ValueError: For a model, text or directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    state, directory = begin(run)
    model, tokenizer = _load(run.path), load_tokenizer(run.path)
    if not isinstance(model, Routed) and not run.dense.steps:
        raise ValueError(
            f"dense.steps is 0, and the model in {run.path} has no routed heads to tune; convert "
            "it with `headwise convert`, or give dense.steps"
        )
    check_length("sequence_length", run.sequence_length, model, run.path)
    original = _original(run, model, tokenizer)
    text = load_tokens(run, tokenizer, model.get_input_embeddings().num_embeddings)
    dense_blocks, routed_blocks = training_blocks(run, text)
    setting = _Setting(run, directory, state, tokenizer, held_out_blocks(run, text), original)
    main = state.is_main_process
    sums = fingerprint({name: [stream] for name, stream in text.training.items()})
    with directory.claim(run, sums) if main else nullcontext():
        state.wait_for_everyone()
        points = _train_stages(setting, model, dense_blocks, routed_blocks)
        if main:
            recovery.report(run, points)


def _train_stages(
    setting: _Setting, model: Any, dense_blocks: Dataset, routed_blocks: Dataset
) -> list[Point]:
    run, points = setting.run, []
    if run.dense.steps:
        dense = restore(model) if isinstance(model, Routed) else model
        points += _train(setting, "dense", run.dense, dense, dense_blocks)
    if isinstance(model, Routed) and run.routed.steps:
        if run.dense.steps:
            adapted = _load(setting.directory.model("dense", run.seed))
            model.load_state_dict(adapted.state_dict(), strict=False)  # all but the routers
        points += _train(setting, "routed", run.routed, model, routed_blocks)
    return points


def _load(path: str | Path) -> Any:
    """In float32, which weights are trained in."""
    return load_causal_lm(str(path), dtype=torch.float32)


def _original(run: TuningRun, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    if run.original is None:
        # Not the model itself, which learns.
        return restore(model) if isinstance(model, Routed) else _load(run.path)
    original, other = _load(run.original), load_tokenizer(run.original)
    if tokenizer is not None and other is not None and tokenizer.get_vocab() != other.get_vocab():
        raise ValueError(
            f"original is {run.original}, whose tokenizer is not that of {run.path}; a model can "
            "only be compared with one that reads the same tokens"
        )
    if original.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"original is {run.original}, with {original.config.vocab_size} entries in its "
            f"vocabulary; the model in {run.path} has {model.config.vocab_size}"
        )
    return original


def _train(setting: _Setting, name: str, stage: Stage, model: Any, blocks: Dataset) -> list[Point]:
    """Train a stage and save its model; when it is finished already, read what it came to."""
    run, state = setting.run, setting.state
    finished = setting.directory.model(name, run.seed)
    if finished.exists():
        file = finished / _POINTS_FILE
        with reading(file, hint=f"delete {finished} to train that stage again"):
            return [Point(**point) for point in json.loads(file.read_text())]
    set_seed(run.seed)
    trainer = _trainer(setting, name, stage, model, blocks)
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if run.resume else None)
    if trainer.state.global_step % run.eval_every:
        trainer.evaluate()
    points = recovery.points(run, name, model, trainer)
    # Gathered from shards, tied weights come as copies of each other.
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {k: v for k, v in gathered.items() if k not in model.all_tied_weights_keys}

    def save(directory: Path) -> None:
        model.save_pretrained(directory, state_dict=weights)
        if setting.tokenizer is not None:
            setting.tokenizer.save_pretrained(directory)
        (directory / _POINTS_FILE).write_text(json.dumps([p._asdict() for p in points]))
        write_manifest(directory)
        # After the manifest: the card may be edited.
        if isinstance(model, Routed):
            (directory / "README.md").write_text(_card(run, finished, model, points))

    if state.is_main_process:
        write_whole(finished, save)
    state.wait_for_everyone()
    return points


def _card(run: TuningRun, directory: Path, model: Any, points: list[Point]) -> str:
    last = points[-1]
    weights = (
        f"Tuned on {last.tokens:,} tokens of {Path(run.data).name if run.data else 'text'}, "
        f"divergence from the original weighted {run.distill:g} (0: none)."
    )
    figures = (
        f"\nPerplexity of held-out text: {last.perplexity}, the original's "
        f"{last.original_perplexity}: {last.recovery} % recovered.\n"
    )
    name = "/".join(directory.parts[-3:])
    return model_card(model, run.original or run.path, name, weights=weights, figures=figures)


def _trainer(
    setting: _Setting, name: str, stage: Stage, model: Any, blocks: Dataset
) -> RecoveringTrainer:
    run, directory = setting.run, setting.directory
    return RecoveringTrainer(
        model=model,
        args=training_arguments(
            run, stage, seed=run.seed, state=setting.state,
            checkpoints=directory.checkpoints(name, run.seed), name=f"{run.output.name}-{name}",
            eval_on_start=True,
        ),
        train_dataset=blocks,
        eval_dataset=setting.held_out,
        data_collator=default_data_collator,
        title=name,
        per_step=run.batch_size * run.sequence_length,
        original=setting.original,
        distill=run.distill if name == "routed" else 0.0,
    )  # fmt: skip
