"""Mixtures of Hugging Face datasets as an endless stream of blocks to train on."""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from headwise.data.sources import Source, check_names, open_rows, read_texts
from headwise.data.text import Domain, tokenize

_DOCUMENTS_AT_A_TIME = 64


def stream_blocks(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    seed: int,
    end: int | None,
    held_out: Iterable[Domain] = (),
    buffer: int = 1024,
) -> "BlockStream":
    """The mixture as an endless stream of blocks to train on; see `BlockStream`.

    Args:
        sources: The mixture.
        tokenizer: Makes tokens of a text.
        sequence_length: Tokens of a block.
        seed: Of the mixture, of the order of a source's files, and of the shuffling.
        end: Token that follows every document, if any.
        held_out: Documents in the validation part of these, and any equal to one, are left out.
        buffer: Blocks of a source that are read, and shuffled, at a time.

    Raises:
        ValueError: If a source cannot be read, has no such column or nothing to train on.
    """
    for name, value in (("sequence_length", sequence_length), ("buffer", buffer)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_names(sources)
    left_out = frozenset(
        _digest(text) for domain in held_out for text in domain.validation.values()
    )
    packed = [
        _Packed(source, number, tokenizer, sequence_length, seed, end, left_out, buffer)
        for number, source in enumerate(sources)
    ]
    return BlockStream(packed, np.array([source.weight for source in sources]), seed)


class BlockStream(IterableDataset[dict[str, Tensor]]):
    """Endless blocks of one source each, drawn so that sources have their shares of all tokens.

    The documents of a source are packed one after another without padding, and begin anew when
    all were read. A share counts tokens: `datasets.interleave_datasets` would draw documents, of
    which one of a book is worth hundreds of a forum.

    Under transformers' Trainer, process 0 reads and deals each batch out (accelerate's
    `dispatch_batches`, its default here): processes get different blocks, and a step the same
    ones whatever their number. Trainer resumes by reading again all that was trained on.
    `state_dict` and `load_state_dict`, which torchdata's StatefulDataLoader calls, make tokens of
    at most one buffer of each source again. Both give the blocks that a run without a stop has.

    Made by `stream_blocks`.
    """

    def __init__(self, packed: "list[_Packed]", weights: NDArray[np.float64], seed: int):
        self._packed = packed
        self._shares = weights / weights.sum()
        self._seed = seed
        self._generator = np.random.default_rng(seed)
        self._loaded: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers is {worker.num_workers}; a stream is read by at most 1, "
                "as the order of its blocks would depend on their number"
            )
        state, self._loaded = self._loaded, None
        self._generator = np.random.default_rng(self._seed)
        if state is not None:
            self._generator.bit_generator.state = state["mixture"]
        for packed in self._packed:
            packed.start(None if state is None else state["sources"][packed.source.name])
        while True:
            source = self._generator.choice(len(self._packed), p=self._shares)
            ids = torch.from_numpy(self._packed[source].take().astype(np.int64))
            yield {"input_ids": ids, "labels": ids.clone()}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, after the last block that it gave; of plain types."""
        if self._loaded is not None:
            return self._loaded
        return {
            "mixture": self._generator.bit_generator.state,
            "sources": {packed.source.name: packed.state() for packed in self._packed},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on from there.

        Raises:
            ValueError: If the state is of other sources.
        """
        names = [packed.source.name for packed in self._packed]
        if sorted(state["sources"]) != sorted(names):
            raise ValueError(f"the state is of sources {sorted(state['sources'])}, not {names}")
        self._loaded = state


class _Packed:
    """Blocks of one source, by whole buffers: a buffer's beginning and a count say where it is."""

    def __init__(
        self,
        source: Source,
        number: int,
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        end: int | None,
        left_out: frozenset[bytes],
        buffer: int,
    ):
        self.source = source
        self.tokenizer, self.length, self.end = tokenizer, length, end
        self.seed, self.left_out, self.buffer = (seed, number), left_out, buffer
        rows = open_rows(source)
        if next(self._documents(rows), None) is None:
            raise ValueError(f"source {source.name!r} has no text but what is held out")
        self.rows = rows.repeat(None)
        # This is how datasets shuffles files without a buffer of documents, which no state keeps.
        self.rows.set_epoch(seed + 1)
        self.start(None)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which starts anew: without the documents that are being read."""
        return self.__dict__ | {"documents": None, "blocks": None}

    def start(self, state: dict[str, Any] | None) -> None:
        """From a state, or the beginning; nothing is read before the first block is taken."""
        state = state or {"rows": None, "rest": [], "buffers": 0, "taken": 0}
        self.rows.load_state_dict(state["rows"])
        self.rest = np.array(state["rest"], dtype=np.int32)
        self.buffers = state["buffers"]
        self.began = {name: state[name] for name in ("rows", "rest", "buffers")}
        self.blocks: NDArray[np.int32] | None = None
        self.taken = state["taken"]

    def state(self) -> dict[str, Any]:
        return self.began | {"taken": self.taken}

    def take(self) -> NDArray[np.int32]:
        if self.blocks is None:
            self.documents = self._documents(self.rows)
            self.blocks = self._read()
        elif self.taken == len(self.blocks):
            self.began = {
                "rows": self.rows.state_dict(),
                "rest": self.rest.tolist(),
                "buffers": self.buffers,
            }
            self.blocks, self.taken = self._read(), 0
        self.taken += 1
        return self.blocks[self.taken - 1]

    def _read(self) -> NDArray[np.int32]:
        """The next buffer, shuffled; the tokens that do not fill a block wait for the one after."""
        pieces = [self.rest]
        while sum(map(len, pieces)) < self.buffer * self.length:
            documents = islice(self.documents, _DOCUMENTS_AT_A_TIME)
            pieces.append(tokenize(self.tokenizer, documents, end=self.end))
        tokens = np.concatenate(pieces)
        whole = len(tokens) // self.length * self.length
        self.rest = tokens[whole:]
        generator = np.random.default_rng((*self.seed, self.buffers))
        self.buffers += 1
        return generator.permutation(tokens[:whole].reshape(-1, self.length))

    def _documents(self, rows: datasets.IterableDataset) -> Iterator[str]:
        texts = read_texts(rows, self.source)
        return (text for text in texts if _digest(text) not in self.left_out)


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()
