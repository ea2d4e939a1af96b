"""Carrying out a run: text, models one after another, table, report. All of it resumes."""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from headwise.data.text import (
    END_OF_TEXT,
    Domain,
    MixedBlocks,
    load_text,
    tokenize,
    train_tokenizer,
)
from headwise.hf.trainer import SafeTrainer
from headwise.recipes.arguments import Stage, begin, training_arguments
from headwise.recipes.directory import RunDirectory, fingerprint, write_whole
from headwise.recipes.lm import LABELS, LanguageModelRun, build_model
from headwise.recipes.results import Text, Trained, measure, read_result, report, write_result

_CURVE_FILES = 16  # of each domain


def train(run: LanguageModelRun) -> None:
    """Train all models of the run, compare them, and write results and report.

    Raises:
        ValueError: For data or an output directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    state, directory = begin(run)
    domains = load_text(run.data)
    if state.is_main_process:
        print("Training a tokenizer on the text", flush=True)
    text = _tokens(run, domains)
    _blocks(run, text, run.seeds[0])
    if state.is_main_process:
        directory.claim(run, _fingerprint(text))
    state.wait_for_everyone()
    models = [(name, seed) for name in run.models for seed in run.seeds]
    trained = [
        _train_one(run, directory, text, name, seed, state, count=f"{index}/{len(models)}")
        for index, (name, seed) in enumerate(models, start=1)
    ]
    if state.is_main_process:
        report(run, directory, text, trained)


def _tokens(run: LanguageModelRun, domains: list[Domain]) -> Text:
    bpe = train_tokenizer(domains, vocab_size=run.vocab_size)
    end = bpe.token_to_id(END_OF_TEXT)
    return Text(
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT),
        training={d.name: tokenize(bpe, d.training.values(), end=end) for d in domains},
        validation={
            d.name: {file: tokenize(bpe, [text], end=end) for file, text in d.validation.items()}
            for d in domains
        },
    )


def _train_one(
    run: LanguageModelRun,
    directory: RunDirectory,
    text: Text,
    name: str,
    seed: int,
    state: PartialState,
    count: str,
) -> Trained:
    finished = directory.model(name, seed)
    if (result := read_result(finished)) is not None:
        return result
    set_seed(seed)
    model = build_model(run, name, vocab_size=len(text.tokenizer), seed=seed)
    training, validation = _blocks(run, text, seed)
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
            checkpoints=directory.checkpoints(name, seed),
            name=f"{directory.root.name}-{name}-seed{seed}",
        ),
        train_dataset=training,
        eval_dataset=validation,
        data_collator=default_data_collator,
        title=f"{count}  {LABELS[name]}, seed {seed}",
        tokens_per_step=run.batch_size * run.sequence_length,
    )
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if run.resume else None)
    trained = measure(run, text, trainer, name, seed)
    if state.is_main_process:
        write_whole(finished, lambda partial: _save(partial, trainer.model, text, trained))
    state.wait_for_everyone()
    return trained


def _blocks(
    run: LanguageModelRun, text: Text, seed: int
) -> tuple[MixedBlocks, list[dict[str, torch.Tensor]]]:
    """What to train on, and for the validation curve the first block of some held-out files."""
    training = MixedBlocks(
        text.training,
        sequence_length=run.sequence_length,
        num_blocks=run.steps * run.batch_size,
        exponent=run.domain_exponent,
        seed=seed,
    )
    long_enough = [
        [tokens for tokens in files.values() if len(tokens) >= run.sequence_length]
        for files in text.validation.values()
    ]
    blocks = [
        torch.from_numpy(tokens[: run.sequence_length].astype(np.int64))
        for domain in long_enough
        for tokens in domain[:_CURVE_FILES]
    ]
    if not blocks:
        raise ValueError(
            f"sequence_length is {run.sequence_length}, longer than every held-out file"
        )
    return training, [{"input_ids": block, "labels": block} for block in blocks]


def _save(directory: Path, model: PreTrainedModel, text: Text, trained: Trained) -> None:
    model.save_pretrained(directory)
    text.tokenizer.save_pretrained(directory)
    write_result(directory, trained)


def _fingerprint(text: Text) -> dict[str, str]:
    return fingerprint({
        domain: [stream, *text.validation[domain].values()]
        for domain, stream in text.training.items()
    })  # fmt: skip
