"""Tokens to tune on: from text by the model's tokenizer, or as `headwise samples` wrote them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import compute, parquet
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from headwise.data.sampling import spread
from headwise.data.text import MixedBlocks, load_text, tokenize
from headwise.errors import UnreadableError, reading
from headwise.recipes.evaluation import Tokens
from headwise.recipes.tuning import TuningRun

TOKEN_COLUMN = "input_ids"
TOKEN_FILE = ".parquet"


class TuningText(NamedTuple):
    """Tokens by domain: a stream to train on, and one held out."""

    training: dict[str, Tokens]
    held_out: dict[str, Tokens]


def load_tokens(
    run: TuningRun, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> TuningText:
    """The tokens of `run.data`.

    Raises:
        ValueError: If there is no text or no tokenizer for it, or its tokens are not the model's.
    """
    if run.data is not None and Path(run.data).suffix == TOKEN_FILE:
        text = _of_token_file(Path(run.data), run.sequence_length)
    elif tokenizer is None:
        raise ValueError(
            f"{run.path} has no tokenizer, and text needs one; save one beside it, or give data "
            "that `headwise samples` wrote"
        )
    else:
        text = _of_text(run.data, tokenizer)
    for stream in (*text.training.values(), *text.held_out.values()):
        check_tokens(stream, vocab_size, run.path)
    return text


def check_tokens(tokens: Tokens, vocab_size: int, path: str) -> None:
    """Whether the model in that path has embeddings for all of them.

    Raises:
        ValueError: If it has not.
    """
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(
            f"the text has token {tokens.max()}, and the model in {path} has embeddings for "
            f"0..{vocab_size - 1}: its tokenizer does not match it, or the tokens are another "
            "model's"
        )


def token_rows(file: Path) -> list[Tokens]:
    """The rows of a file that `headwise samples` wrote.

    Raises:
        ValueError: If there is no such file, it has no column "input_ids", or that holds something
            else than rows of tokens.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    with reading(file, "a Parquet file"):
        table = parquet.read_table(file)
    if TOKEN_COLUMN not in table.column_names:
        raise UnreadableError(
            f"{file} has columns {table.column_names}; one must be {TOKEN_COLUMN!r}"
        )
    column = table[TOKEN_COLUMN]
    kind = getattr(column.type, "value_type", None)
    if kind is None or not pyarrow.types.is_integer(kind):
        raise UnreadableError(
            f"column {TOKEN_COLUMN!r} of {file} holds {column.type}; it must hold lists of integers"
        )
    tokens = compute.list_flatten(column)
    if column.null_count or tokens.null_count:
        raise UnreadableError(f"column {TOKEN_COLUMN!r} of {file} has gaps (null)")
    # Before they become int32, where a token beyond it would be another one.
    ends = compute.min_max(tokens)
    for token in (ends["min"].as_py(), ends["max"].as_py()):
        if token is not None and not 0 <= token < 2**31:
            raise UnreadableError(f"{file} has token {token}; tokens lie in 0..{2**31 - 1}")
    return [row.values.to_numpy(zero_copy_only=False).astype(np.int32) for row in column]


def training_blocks(run: TuningRun, text: TuningText) -> tuple[Dataset, Dataset]:
    """The sequences of the dense stage, then those of the routed one, which go on from there."""
    blocks = MixedBlocks(
        text.training,
        sequence_length=run.sequence_length,
        num_blocks=(run.dense.steps + run.routed.steps) * run.batch_size,
        exponent=run.domain_exponent,
        seed=run.seed,
    )
    first = run.dense.steps * run.batch_size
    return Subset(blocks, range(first)), Subset(blocks, range(first, len(blocks)))


def held_out_blocks(run: TuningRun, text: TuningText) -> list[dict[str, torch.Tensor]]:
    """`run.eval_blocks` sequences, spread evenly over what is held out."""
    length = run.sequence_length
    blocks = [
        stream[start : start + length]
        for stream in text.held_out.values()
        for start in range(0, len(stream) - length + 1, length)
    ]
    if not blocks:
        raise ValueError(
            f"sequence_length is {length}, longer than all that is held out of data = {run.data}"
        )
    picks = spread(len(blocks), run.eval_blocks)
    ids = [torch.from_numpy(blocks[i].astype(np.int64)) for i in picks]
    return [{"input_ids": block, "labels": block} for block in ids]


def _of_text(data: str | None, tokenizer: PreTrainedTokenizerBase) -> TuningText:
    domains = load_text(data)
    fast, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    return TuningText(
        training={d.name: tokenize(fast, d.training.values(), end=end) for d in domains},
        held_out={d.name: tokenize(fast, d.validation.values(), end=end) for d in domains},
    )


def _of_token_file(file: Path, length: int) -> TuningText:
    """Each row is cut into whole sequences; every tenth row is held out."""
    rows = token_rows(file)
    cut = [row[: len(row) // length * length] for row in rows]
    held_out, training = cut[::10], [row for i, row in enumerate(cut) if i % 10]
    if not training or not sum(map(len, training)):
        longest = max(map(len, rows), default=0)
        raise ValueError(
            f"sequence_length is {length}, but {file} has rows of at most {longest} tokens; give "
            f"--sequence-length {longest} or less, and at least two such rows"
        )
    return TuningText({file.stem: np.concatenate(training)}, {file.stem: np.concatenate(held_out)})
