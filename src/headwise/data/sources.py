"""Parts of a mixture of text: Hugging Face datasets, read a row at a time and never kept whole."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from headwise.data.text import Domain


@dataclass(frozen=True)
class Source:
    """A part of a mixture: what `datasets.load_dataset` takes, and its share.

    Attributes:
        dataset: Repository on the Hub, or a builder ("json", "parquet", "text") for `data_files`.
        configuration: Of the dataset, where it has several.
        split: Of the dataset.
        column: Where the text is.
        weight: Its share of all tokens is weight / the sum of the weights; above 0.
        domain: Its name in tables and errors; the dataset's and configuration's where None.
        data_files: Paths or URLs, globs too: which files of the dataset, or for the builder.
        revision: Commit, branch or tag of the repository; a commit makes a run repeatable.
    """

    dataset: str
    configuration: str | None = None
    split: str = "train"
    column: str = "text"
    weight: float = 1.0
    domain: str | None = None
    data_files: str | tuple[str, ...] | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight} for {self.name!r}; it must be above 0")

    @property
    def name(self) -> str:
        return self.domain or ":".join(filter(None, (self.dataset, self.configuration)))


def sample_domains(sources: Sequence[Source], *, held_out: int, training: int) -> list[Domain]:
    """The first documents of every source: some to measure on, some to train a tokenizer on.

    Args:
        sources: The mixture.
        held_out: Documents of each that are held out: the first ones with text.
        training: Documents of each that follow; those equal to one held out are left out.

    Returns:
        A domain for each source; its documents are named by their number.

    Raises:
        ValueError: If a source cannot be read, has no such column, or too few documents.
    """
    for name, value in (("held_out", held_out), ("training", training)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_names(sources)
    domains = []
    for source in sources:
        texts = list(islice(read_texts(open_rows(source), source), held_out + training))
        first = {str(i): text for i, text in enumerate(texts[:held_out])}
        left_out = set(first.values())
        rest = {str(i): t for i, t in enumerate(texts) if i >= held_out and t not in left_out}
        if not rest:
            raise ValueError(
                f"source {source.name!r} has {len(texts)} documents with text; held_out = "
                f"{held_out} leaves none to train on"
            )
        domains.append(Domain(source.name, training=rest, held_out=first))
    return domains


def open_rows(source: Source) -> Any:
    """The rows of a source, with the text's column alone: an `IterableDataset` of datasets.

    Raises:
        ValueError: If it cannot be read, is empty, or has no such column.
    """
    # Imported here: all runs import this file, and few stream text.
    import datasets

    files = source.data_files
    try:
        rows = datasets.load_dataset(
            source.dataset,
            source.configuration,
            split=source.split,
            data_files=list(files) if isinstance(files, tuple) else files,
            revision=source.revision,
            streaming=True,
        )
        first = next(iter(rows), None)
    except Exception as error:  # of datasets, the Hub, file systems and parsers alike
        raise ValueError(
            f"source {source.name!r} cannot be read: {source} ({type(error).__name__}: {error})"
        ) from error
    if first is None:
        raise ValueError(f"source {source.name!r} is empty: {source}")
    if source.column not in first:
        raise ValueError(
            f"source {source.name!r} has columns {sorted(first)}; column is {source.column!r}"
        )
    return rows.select_columns([source.column])


def read_texts(rows: Iterable[dict[str, Any]], source: Source) -> Iterator[str]:
    """The texts of a source's rows that are not blank.

    Raises:
        ValueError: If the column holds something else than text.
    """
    for row in rows:
        text = row[source.column]
        if not isinstance(text, str | None):
            raise ValueError(
                f"source {source.name!r} has a {type(text).__name__} in column "
                f"{source.column!r}; it must be text"
            )
        if text and text.strip():
            yield text


def check_names(sources: Sequence[Source]) -> None:
    """Raises ValueError if there are no sources, or two of a name."""
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"sources are {names}; there must be some, each of another name (domain)")
