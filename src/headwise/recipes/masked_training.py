"""Carrying out a masked run: data, models one after another, table. All of it resumes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import default_data_collator, set_seed

from headwise.data.masked_pairs import IGNORED, MaskedPairs
from headwise.hf.trainer import SafeTrainer
from headwise.models import MaskedModel
from headwise.models.masked import summed_nats
from headwise.parity import count_parameters, measure_flops
from headwise.recipes.arguments import Stage, begin, training_arguments
from headwise.recipes.directory import RunDirectory, fingerprint, write_json, write_whole
from headwise.recipes.masked import LABELS, MaskedRun, build_model, flops_per_token
from headwise.recipes.masked_data import Pairs, masked_pairs, prepare
from headwise.recipes.masked_table import Row, for_terminal
from headwise.recipes.results import environment
from headwise.recipes.table import write_csv

_RESULT_FILE = "result.json"


def train_masked(run: MaskedRun) -> None:
    """Train all models of the run, compare them, write results.csv and print the table.

    Raises:
        ValueError: For data or an output directory that cannot be used, before anything is written.
        FloatingPointError: When a loss is not finite; checkpoints stay.
    """
    state, directory = begin(run)
    if state.is_main_process:
        print("Training a tokenizer on the captions, a codebook on the patches", flush=True)
    pairs = prepare(run)
    _, held_out = masked_pairs(run, pairs, run.seeds[0])
    _check_text_is_masked(run, held_out)
    if state.is_main_process:
        directory.claim(run, _fingerprint(pairs))
    state.wait_for_everyone()
    models = [(name, seed) for name in run.models for seed in run.seeds]
    rows = [
        _train_one(run, directory, pairs, name, seed, state, count=f"{index}/{len(models)}")
        for index, (name, seed) in enumerate(models, start=1)
    ]
    if state.is_main_process:
        write_csv(directory.root / "results.csv", rows)
        Console().print(for_terminal(rows))
        print(f"\nTable: {directory.root / 'results.csv'}")


def _train_one(
    run: MaskedRun,
    directory: RunDirectory,
    pairs: Pairs,
    name: str,
    seed: int,
    state: PartialState,
    count: str,
) -> Row:
    finished = directory.model(name, seed)
    if (finished / _RESULT_FILE).exists():
        return json.loads((finished / _RESULT_FILE).read_text())
    set_seed(seed)
    sizes = pairs.sizes()
    model = build_model(run, name, sizes=sizes, codebook=pairs.codebook, seed=seed)
    training, validation = masked_pairs(run, pairs, seed)
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
        tokens_per_step=run.batch_size * _length(model),
    )
    trainer.train(resume_from_checkpoint=trainer.last_checkpoint() if run.resume else None)
    row = _measure(run, pairs, trainer, validation, name, seed)
    if state.is_main_process:
        write_whole(finished, lambda partial: _save(partial, trainer.model, pairs, row))
    state.wait_for_everyone()
    return row


def _check_text_is_masked(run: MaskedRun, held_out: MaskedPairs) -> None:
    patches = held_out.pairs.visual.shape[1]
    items = (held_out[i] for i in range(len(held_out)))
    if all((item["labels"][patches:] == IGNORED).all() for item in items):
        raise ValueError(
            f"mask_text is {run.mask_text}, with which no token of the {len(held_out.pairs)} "
            f"held-out captions is masked in {run.eval_masks} tries; it or eval_masks must be more"
        )


def _length(model: MaskedModel) -> int:
    return model.config.num_patches + model.config.max_text_length


def _measure(
    run: MaskedRun, pairs: Pairs, trainer: SafeTrainer, held_out: MaskedPairs, name: str, seed: int
) -> Row:
    model: Any = trainer.model
    model.eval()
    total, active = count_parameters(model)
    example = {key: x[None].to(model.device) for key, x in held_out[0].items()}
    with torch.no_grad():
        counted = measure_flops(lambda: model(**example)) / _length(model)
    text, patches = perplexities(model, held_out, batch_size=run.batch_size)
    return {
        "recipe": "masked",
        "model": name,
        "seed": seed,
        "parameters": total,
        "active_parameters": active,
        "flops_per_token": round(flops_per_token(model)),
        "flops_per_token_counted": round(counted),
        "perplexity_text": round(text, 3),
        "perplexity_patches": round(patches, 3),
        "guess_text": round(_of_the_best_guess(_real_tokens(pairs)), 3),
        "guess_patches": round(_of_the_best_guess(pairs.validation.visual), 3),
        "tokens_per_second": round(trainer.speed.tokens_per_second()),
        "steps": run.steps,
        "tokens": run.steps * run.batch_size * _length(model),
        **environment(run.precision),
    }


@torch.no_grad()
def perplexities(model: MaskedModel, pairs: MaskedPairs, *, batch_size: int) -> tuple[float, float]:
    """Of the masked text tokens and of the masked patches, over all pairs."""
    model.eval()
    nats, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    for batch in DataLoader(pairs, batch_size=batch_size):
        labels = batch.pop("labels").to(model.device)
        output = model(**{key: x.to(model.device) for key, x in batch.items()})
        image, text = labels.split([model.config.num_patches, output.text_logits.shape[1]], dim=1)
        for i, part in enumerate([(output.text_logits, text), (output.image_logits, image)]):
            summed, count = summed_nats(*part)
            nats[i] += summed.cpu()
            counts[i] += count.cpu()
    of_text, of_patches = (nats / counts).exp().tolist()
    return of_text, of_patches


def _of_the_best_guess(tokens: NDArray[np.int64]) -> float:
    """Perplexity of a model that knows how frequent the held-out tokens are, and nothing else."""
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _real_tokens(pairs: Pairs) -> NDArray[np.int64]:
    held_out = pairs.validation
    return held_out.tokens[np.arange(held_out.tokens.shape[1]) < held_out.lengths[:, None]]


def _save(directory: Path, model: Any, pairs: Pairs, row: Row) -> None:
    model.save_pretrained(directory)
    pairs.tokenizer.save_pretrained(directory)
    write_json(directory / _RESULT_FILE, row)


def _fingerprint(pairs: Pairs) -> dict[str, str]:
    parts = {"training": pairs.training, "validation": pairs.validation}
    return fingerprint({
        name: [part.pixels, part.tokens, part.lengths, part.visual] for name, part in parts.items()
    })  # fmt: skip
