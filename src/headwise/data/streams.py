"""Mixtures of Hugging Face datasets as an endless stream of blocks to train on.

A source is read in buffers. Say that a block has T = 5 tokens, a buffer 2 blocks, and a document
three tokens and the end token "."; documents are read one at a time here, really 64:

    documents             aaa.  bbb.  ccc.  ddd.  eee.  …
    first buffer          aaa.bbb.ccc.      12 tokens, which are at least 2 · T
    its blocks [N, T]     aaa.b  bb.cc      N = 2, shuffled; c. is the rest
    second buffer         c.ddd.eee.        the rest first: no token is lost between buffers
    its blocks [N, T]     c.ddd  .eee.      N = 2; nothing is the rest

The mixture draws a source for each block, by the sources' shares. To go on after a stop, the stream
need not keep blocks. It keeps, of each source, where the present buffer began (the place in the
rows, the rest before it, its number, which is the seed of its shuffle) and how many of its blocks
were taken. From there it reads that buffer again.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from headwise.data.sources import Source, check_names, open_rows, read_texts
from headwise.data.text import Domain, tokenize

_DOCUMENTS_AT_A_TIME = 64


class BlockStream(IterableDataset[dict[str, Tensor]]):
    """Endless blocks of one source each; sources have their shares of all tokens.

    The documents of a source are packed one after another without padding. They begin anew when all
    were read. A share counts tokens. `datasets.interleave_datasets` would draw documents, and one
    book is worth hundreds of posts in a forum.

    Under transformers' Trainer, process 0 reads and hands out each batch (accelerate's
    `dispatch_batches`, its default here). Processes get different blocks, and a step gets the same
    blocks whatever the number of processes.

    There are two ways to go on after a stop, and both give the blocks of a run without a stop.
    Trainer reads again all that was trained on. torchdata's StatefulDataLoader calls `state_dict`
    and `load_state_dict`, which read at most one buffer of each source again.

    Args:
        sources: The mixture.
        tokenizer: Makes tokens of a text.
        sequence_length: Tokens of a block.
        seed: Of the mixture, of the order of a source's files, and of the shuffling.
        end: Token that follows every document, if any.
        held_out: Documents that these hold out, and any equal to one, are left out.
        buffer: Blocks of a source that are read, and shuffled, at a time.

    Raises:
        ValueError: If a source cannot be read, has no such column or nothing to train on.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        end: int | None,
        held_out: Iterable[Domain] = (),
        buffer: int = 1024,
    ):
        for name, value in (("sequence_length", sequence_length), ("buffer", buffer)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        check_names(sources)
        left_out = frozenset(_digest(t) for domain in held_out for t in domain.held_out.values())
        self._packed = [
            _Packed(source, number, tokenizer, sequence_length, seed, end, left_out, buffer)
            for number, source in enumerate(sources)
        ]
        weights = np.array([source.weight for source in sources])
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
        """Where the stream stands after the last block that it gave; of plain types."""
        # A state that was loaded and not used yet is where the stream stands.
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


@dataclass(eq=False)
class _Packed:
    """Blocks [T] of one source, one after another; the module's docstring has an example.

    `began` is the state before the present buffer was read: the place in the rows, the rest of the
    buffer before, and how many buffers came before. `taken` of its blocks were given.
    """

    source: Source
    number: int
    tokenizer: Tokenizer
    length: int
    seed: int
    end: int | None
    left_out: frozenset[bytes]
    buffer: int

    def __post_init__(self) -> None:
        rows = open_rows(self.source)
        if next(self._documents(rows), None) is None:
            raise ValueError(f"source {self.source.name!r} has no text but what is held out")
        self.rows = rows.repeat(None)
        # Another epoch has another order of the files. `shuffle` would give that too, but it holds
        # documents in a buffer, which no state keeps.
        self.rows.set_epoch(self.seed + 1)
        self.start(None)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which starts anew: generators cannot be pickled."""
        return self.__dict__ | {"documents": None, "blocks": None}

    def start(self, state: dict[str, Any] | None) -> None:
        """Go to a state, or to the beginning; nothing is read before the first block is taken."""
        state = state or {"rows": None, "rest": [], "buffers": 0, "taken": 0}
        self.rows.load_state_dict(state["rows"])
        self.rest = np.array(state["rest"], dtype=np.int32)
        self.buffers = state["buffers"]
        self.began = {name: state[name] for name in ("rows", "rest", "buffers")}
        self.blocks: NDArray[np.int32] | None = None  # [N, T], of the present buffer
        self.taken = state["taken"]

    def state(self) -> dict[str, Any]:
        """Where `start` goes on: at the block after the last one taken."""
        return self.began | {"taken": self.taken}

    def take(self) -> NDArray[np.int32]:
        """The next block [T]."""
        if self.blocks is None:
            # The first block after a start: of the buffer that began there, `taken` were given.
            self.documents = self._documents(self.rows)
            self.blocks = self._read()
        elif self.taken == len(self.blocks):
            # The buffer is used up: the next one begins here.
            self.began = {
                "rows": self.rows.state_dict(),
                "rest": self.rest.tolist(),
                "buffers": self.buffers,
            }
            self.blocks, self.taken = self._read(), 0
        self.taken += 1
        return self.blocks[self.taken - 1]

    def _read(self) -> NDArray[np.int32]:
        """The next buffer as blocks [N, T], shuffled; tokens that fill no block are the rest."""
        pieces = [self.rest]
        # Tokenizers are fast on many documents at a time; so a buffer may be longer than asked for.
        while sum(map(len, pieces)) < self.buffer * self.length:
            documents = islice(self.documents, _DOCUMENTS_AT_A_TIME)
            pieces.append(tokenize(self.tokenizer, documents, end=self.end))
        tokens = np.concatenate(pieces)
        whole = len(tokens) // self.length * self.length  # N · T
        self.rest = tokens[whole:]
        # A buffer's own seed: it comes out the same when it is read again.
        generator = np.random.default_rng((self.seed, self.number, self.buffers))
        self.buffers += 1
        return generator.permutation(tokens[:whole].reshape(-1, self.length))

    def _documents(self, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        """The source's texts, without what is held out."""
        texts = read_texts(rows, self.source)
        return (text for text in texts if _digest(text) not in self.left_out)


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()
