"""Text to train on: embedded in every Python, from files, or from Hugging Face datasets."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

from headwise.data.sampling import draw, halves, spread
from headwise.data.token_files import Tokens
from headwise.errors import UnreadableError, in_a_line, reading

END_OF_TEXT = "<|endoftext|>"
_HELD_OUT_ONE_IN = 10
# Of the embedded prose, which is short: a tenth would be seven documents.
_PROSE_ONE_IN = 3


@dataclass(frozen=True)
class Domain:
    """Documents of one kind, by name; those held out are never trained on."""

    name: str
    training: dict[str, str]
    held_out: dict[str, str]


def load_text(data: str | None = None) -> list[Domain]:
    """The domains to train on.

    Args:
        data: None for the embedded text; a file; a directory, each of whose subdirectories is a
            domain (one domain where there are none); or the name of a Hugging Face dataset with a
            column "text" ("name" or "name:configuration").

    Raises:
        ValueError: If there is no text, or a file is not UTF-8.
    """
    if data is None:
        return embedded_text()
    path = Path(data)
    if path.is_file():
        return [_split(path.stem, _pieces(path), data)]
    if path.is_dir():
        return _domains_of_directory(path)
    rows = hugging_face_rows(data)
    if "text" not in rows.column_names:
        raise ValueError(f"dataset {data!r} has columns {rows.column_names}; one must be 'text'")
    return [_split(data, {str(i): text for i, text in enumerate(rows["text"])}, data)]


def subdirectories(path: Path) -> list[Path]:
    """Directories in a directory that are not hidden: its domains."""
    return [p for p in sorted(path.iterdir()) if p.name[0] != "." and p.is_dir()]


def embedded_text() -> list[Domain]:
    """Two domains that every Python carries: its library's source, and its reference in prose.

    "code" is the standard library without tests (about 12 MB), "prose" the topics of `help()`
    (about 0.75 MB of English), of which a third is held out. Both differ a little between Python
    versions.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
    files = (p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts))
    # A handful of the files are test data in other encodings.
    code = {str(p.relative_to(root)): p.read_bytes().decode("utf-8", "replace") for p in files}
    prose = _split("prose", dict(topics), "pydoc_data", one_in=_PROSE_ONE_IN)
    return [_split("code", code, str(root)), prose]


def train_tokenizer(
    domains: Iterable[Domain], *, vocab_size: int, show_progress: bool = False
) -> Tokenizer:
    """A byte-level BPE from the training documents; entry 0 is the end of a text.

    Progress is shown as bars on stderr, where that is a terminal.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    documents = [text for domain in domains for text in domain.training.values()]
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    # A document that talks of the end of a text does not end there.
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenize(
    tokenizer: Tokenizer, documents: Iterable[str], *, end: int | None
) -> NDArray[np.int32]:
    """All documents in one row of tokens, each followed by the token `end` where there is one."""
    ends, documents = [] if end is None else [end], iter(documents)
    rows = [
        np.array([*encoding.ids, *ends], dtype=np.int32)
        for batch in iter(lambda: list(islice(documents, 256)), [])
        for encoding in tokenizer.encode_batch_fast(batch)
    ]
    return np.concatenate(rows)


def some_blocks(files: Iterable[Tokens], length: int, *, most: int) -> list[Tokens]:
    """At most so many blocks of `length` tokens, spread over all whole ones of the files."""
    blocks = [
        tokens[start : start + length]
        for tokens in files
        for start in range(0, len(tokens) - length + 1, length)
    ]
    return [blocks[i] for i in spread(len(blocks), most)]


class MixedBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of `sequence_length` tokens, drawn from several domains.

    A domain of n tokens gets a share of n**exponent: 1 keeps the natural mix, 0 makes domains
    equal. Blocks of a domain repeat only after all of them were drawn.

    Args:
        streams: Tokens of each domain.
        sequence_length: Tokens of a block.
        num_blocks: Length of the dataset.
        exponent: Of the mix, 0 to 1.
        seed: Of the draw.

    Raises:
        ValueError: If a domain has fewer tokens than one block.
    """

    def __init__(
        self,
        streams: dict[str, NDArray[np.int32]],
        *,
        sequence_length: int,
        num_blocks: int,
        exponent: float,
        seed: int,
    ):
        for name, stream in streams.items():
            if len(stream) < sequence_length:
                raise ValueError(
                    f"domain {name!r} has {len(stream)} tokens of training text; "
                    f"sequence_length = {sequence_length} needs at least as many"
                )
        self.streams = list(streams.values())
        self.sequence_length = sequence_length
        generator = np.random.default_rng(seed)
        weights = np.array([len(stream) ** exponent for stream in self.streams])
        counts = np.floor(weights / weights.sum() * num_blocks).astype(int)
        counts[np.argmax(counts)] += num_blocks - counts.sum()
        self.shares = dict(zip(streams, counts / num_blocks, strict=True))
        blocks = [
            draw(len(stream) // sequence_length, count, generator)
            for stream, count in zip(self.streams, counts, strict=True)
        ]
        domains = np.repeat(np.arange(len(counts)), counts)
        self.draws = generator.permutation(np.stack([domains, np.concatenate(blocks)], axis=1))

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        domain, block = self.draws[index]
        start = block * self.sequence_length
        tokens = self.streams[domain][start : start + self.sequence_length]
        ids = torch.from_numpy(tokens.astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def is_text(text: str) -> bool:
    """Whether UTF-8 can encode it: Python keeps bytes that are none as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def check_exponent(field: str, value: float) -> None:
    """Raises ValueError unless `MixedBlocks` can take it as its exponent."""
    if not 0 <= value <= 1:
        raise ValueError(f"{field} is {value}; it must lie in 0..1")


def halve(files: dict[str, Tokens]) -> tuple[dict[str, Tokens], dict[str, Tokens]]:
    """Held-out files in two halves of about as many tokens: to choose models by, and to report.

    A single file is cut in its middle, so that it is in both.
    """
    if len(files) == 1:
        ((name, tokens),) = files.items()
        middle = len(tokens) // 2
        return {name: tokens[:middle]}, {name: tokens[middle:]}
    names = list(files)
    first, second = halves([len(tokens) for tokens in files.values()])
    return {names[i]: files[names[i]] for i in first}, {names[i]: files[names[i]] for i in second}


def _split(
    name: str, documents: dict[str, str], source: str, *, one_in: int = _HELD_OUT_ONE_IN
) -> Domain:
    """Hold out one document in so many, chosen by its name: the same ones everywhere, always."""
    documents = {key: text for key, text in documents.items() if text.strip()}
    if len(documents) < 2:
        raise ValueError(
            f"data is {source}, which holds {'only one' if documents else 'no'} document with "
            "text; it takes at least 2 files, or one file of at least 2 lines: a tenth of them is "
            "held out to measure on"
        )
    left_out = held_out(documents, one_in=one_in)
    return Domain(
        name,
        training={key: text for key, text in documents.items() if key not in left_out},
        held_out={key: text for key, text in documents.items() if key in left_out},
    )


def held_out(names: Iterable[str], *, one_in: int = _HELD_OUT_ONE_IN) -> set[str]:
    """One in so many, at least one, chosen by a hash of the name."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return set(ranked[: max(1, len(ranked) // one_in)])


def _domains_of_directory(path: Path) -> list[Domain]:
    domains = subdirectories(path)
    beside = next((p for p in sorted(path.iterdir()) if p.name[0] != "." and p.is_file()), None)
    if domains and beside is not None:
        raise ValueError(
            f"{beside} lies beside directories, each of which is a domain; move it into one"
        )
    return [_domain(root) for root in (domains or [path])]


def _domain(root: Path) -> Domain:
    files = visible_files(root)
    if len(files) == 1:
        return _split(root.name, _pieces(files[0]), str(files[0]))
    return _split(root.name, {str(p.relative_to(root)): read(p) for p in files}, str(root))


def visible_files(root: Path) -> list[Path]:
    """All files in a directory and below, but for hidden ones and those in hidden directories."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return [p for p in files if not any(part[0] == "." for part in p.relative_to(root).parts)]


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: Naming the file, if it is not UTF-8 or cannot be read.
    """
    with reading(path):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UnreadableError(
                f"{path} is not UTF-8 text ({error}); convert or remove it"
            ) from None


def _pieces(path: Path, count: int = 50) -> dict[str, str]:
    """A single file as documents: about `count` runs of whole lines."""
    lines = read(path).splitlines(keepends=True)
    size = max(1, -(-len(lines) // count))
    starts = range(0, len(lines), size)
    return {f"lines {s + 1}-{s + size}": "".join(lines[s : s + size]) for s in starts}


def hugging_face_rows(data: str, *, split: str = "train") -> Any:
    """A split of a Hugging Face dataset ("name" or "name:configuration").

    Raises:
        ValueError: If `data` is rather a path, or nothing could be loaded.
    """
    import datasets

    path = Path(data)
    if path.is_absolute() or data.startswith((".", "~")) or path.suffix or data.count("/") > 1:
        raise ValueError(f"data is {data!r}; there is no such file or directory")
    repository, _, configuration = data.partition(":")
    # Without a network it takes half a minute to find out that there is none.
    name = in_a_line(data)
    print(f"{name} is no file or directory here: asking the Hugging Face hub", file=sys.stderr)
    try:
        return datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:
        raise ValueError(
            f"data is {data!r}: no such file or directory, and no Hugging Face dataset could be "
            f"loaded under that name ({type(error).__name__}: {error})"
        ) from error
