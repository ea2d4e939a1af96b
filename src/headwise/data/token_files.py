"""Files of tokens, as `headwise write-text` writes them, and whether a model knows such tokens."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headwise.errors import UnreadableError, reading

Tokens = NDArray[np.int32]

TOKEN_COLUMN = "input_ids"
TOKEN_FILE = ".parquet"


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
    """The rows of a file that `headwise write-text` wrote.

    Raises:
        ValueError: If there is no such file, it has no column "input_ids", or that holds something
            else than rows of tokens.
    """
    # Imported here: few read such files, and help works without it.
    import pyarrow
    from pyarrow import compute, parquet

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
