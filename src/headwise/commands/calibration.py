"""The texts that `headwise convert` calibrates on, and what it measures on the rest of them."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from headwise.data.text import read
from headwise.data.token_files import TOKEN_FILE, Tokens, check_tokens, token_rows
from headwise.hf.auto import auto_class_of
from headwise.hf.calibration import Batches
from headwise.loading import longest_sequence
from headwise.progress import followed
from headwise.results.rows import environment, measured_on
from headwise.results.table import Cell, Number, Table
from headwise.training.evaluation import FileLoss

_PIECE = 512  # tokens
_MOST_PIECES = 40


class Texts(NamedTuple):
    """Batches of one piece each.

    Attributes:
        calibration: To fit to, of all files.
        held_out: To compare on, by file.
        note: What was taken of each file, in a line each.
    """

    calibration: list[Mapping[str, torch.Tensor]]
    held_out: dict[str, Batches]
    note: str


def read_texts(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    path: str,
) -> Texts:
    """Of each file as many pieces from its start; the last fifth of them is to compare on."""
    calibration: list[Mapping[str, torch.Tensor]] = []
    held_out: dict[str, Batches] = {}
    notes = []
    for file in files:
        pieces = _pieces(file, tokenizer, model, path)
        taken = pieces[: max(2, _MOST_PIECES // len(files))]
        kept = -(-len(taken) // 5)
        calibration += _batches(taken[:-kept], model, tokenizer)
        held_out[file.name] = _batches(taken[-kept:], model, tokenizer)
        notes.append(
            f"{file.name}: calibrated on pieces 1 to {len(taken) - kept} of {len(pieces):,}, "
            f"compared on the next {kept}"
        )
    return Texts(calibration, held_out, "\n".join(notes))


def _pieces(
    file: Path, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, path: str
) -> list[Tokens]:
    """The text in pieces, none longer than the model was made for."""
    length = int(min(_PIECE, longest_sequence(model)))
    if file.suffix == TOKEN_FILE:
        rows = token_rows(file)
    elif tokenizer is None:
        raise ValueError(f"{path} has no tokenizer, and calibrate needs one; save one beside it")
    elif not (text := read(file)).strip():
        raise ValueError(f"calibrate is {file}, which holds no text")
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]
        rows = np.split(np.array(ids, dtype=np.int32), range(length, len(ids), length))
    pieces = [row[:length] for row in rows if len(row) > 1]
    if len(pieces) < 2:
        tokens = sum(map(len, rows))
        least = "2 rows of 2 tokens" if file.suffix == TOKEN_FILE else f"more than {length} tokens"
        raise ValueError(f"calibrate is {file}, of {tokens} tokens in all; it must have {least}")
    check_tokens(np.concatenate(pieces), model.get_input_embeddings().num_embeddings, path)
    return pieces


def _batches(
    pieces: list[Tokens], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Batches:
    """Of a piece each, which is to be predicted whole, or where masked if the model fills masks."""
    ids = [torch.from_numpy(piece.astype(np.int64)) for piece in pieces]
    if not fills_masks(model):
        whole = [piece[None].to(model.device) for piece in ids]
        return [{"input_ids": piece, "labels": piece} for piece in whole]
    if tokenizer is None or tokenizer.mask_token is None:
        raise ValueError(
            "calibrate needs a tokenizer with a mask token, for a model that fills masks"
        )
    collate = DataCollatorForLanguageModeling(tokenizer, seed=0)
    masked = [collate([{"input_ids": piece}]) for piece in ids]
    masked = [batch for batch in masked if (batch["labels"] != -100).any()]
    if not masked:
        raise ValueError("calibrate has a text so short that nothing of a part of it is masked")
    return [{name: x.to(model.device) for name, x in batch.items()} for batch in masked]


def fills_masks(model: Any) -> bool:
    """Whether it is a masked language model, which predicts tokens that it does not see."""
    return auto_class_of(model) is AutoModelForMaskedLM


def twin(model: PreTrainedModel) -> Any:
    """A copy of the model, to be converted by itself; it has the model's own weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def perplexities(models: Mapping[str, Any], texts: Mapping[str, Batches]) -> Table:
    """A row for each model, and a column for each text."""
    names = list(texts)
    columns = ["heads", *(names if len(names) > 1 else ["perplexity"])]
    rows: list[list[Cell]] = [
        [name, *(Number(perplexity(model, name, texts[text]), "{:.4g}") for text in names)]
        for name, model in models.items()
    ]
    legend = "Perplexity of the pieces that had no part in calibration."
    (dtype,) = {str(model.dtype).removeprefix("torch.") for model in models.values()}
    return Table(columns, rows, legend, measured_on([environment(dtype)]))


def perplexity(model: Any, name: str, batches: Batches) -> float:
    """Of the labels of these batches; the name is shown beside the progress."""
    with torch.no_grad():
        tokens = [int((batch["labels"] != -100).sum()) for batch in batches]
        shown = followed(batches, f"perplexity, {name}", total=len(batches))
        nats = [model(**b).loss.item() * n for b, n in zip(shown, tokens, strict=True)]
    return FileLoss(sum(nats), sum(tokens)).perplexity
