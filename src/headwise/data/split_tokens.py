"""Tokens to train on and tokens held out, from text or from a file of tokens."""

from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from headwise.data.text import load_text, tokenize
from headwise.data.token_files import TOKEN_FILE, Tokens, token_rows


class SplitTokens(NamedTuple):
    """By domain a stream to train on, and one held out."""

    training: dict[str, Tokens]
    held_out: dict[str, Tokens]

    def whole(self) -> dict[str, Tokens]:
        """Both streams of each domain, one after the other."""
        pairs = zip(self.training.values(), self.held_out.values(), strict=True)
        return dict(zip(self.training, map(np.concatenate, pairs), strict=True))


def is_token_file(data: str | None) -> TypeGuard[str]:
    """Whether that is tokens already, which need no tokenizer."""
    return data is not None and Path(data).suffix == TOKEN_FILE


def load_tokens(data: str | None, tokenizer: Any, sequence_length: int) -> SplitTokens:
    """The tokens of a text, or of a file of tokens; about a tenth is held out.

    Of the embedded prose, it is a third.

    Args:
        data: Text as `load_text` takes it, or a file that `headwise write-text` wrote.
        tokenizer: Of transformers, for a text.
        sequence_length: Rows of a file of tokens are cut into whole sequences of this length.

    Raises:
        ValueError: If there is no text, or rows are shorter than a sequence.
    """
    if is_token_file(data):
        return _of_token_file(Path(data), sequence_length)
    domains = load_text(data)
    fast, end = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    return SplitTokens(
        training={d.name: tokenize(fast, d.training.values(), end=end) for d in domains},
        held_out={d.name: tokenize(fast, d.held_out.values(), end=end) for d in domains},
    )


def _of_token_file(file: Path, length: int) -> SplitTokens:
    """Every tenth row is held out."""
    rows = token_rows(file)
    cut = [row[: len(row) // length * length] for row in rows]
    held_out, training = cut[::10], [row for i, row in enumerate(cut) if i % 10]
    if not training or not sum(map(len, training)):
        longest = max(map(len, rows), default=0)
        raise ValueError(
            f"sequence_length is {length}, but {file} has rows of at most {longest} tokens; give "
            f"--sequence-length {longest} or less, and at least two such rows"
        )
    return SplitTokens({file.stem: np.concatenate(training)}, {file.stem: np.concatenate(held_out)})
