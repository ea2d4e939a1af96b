"""The text of a run in tokens: what its models train on, and the files they are scored on."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from headwise.data.mixtures import find_mixture
from headwise.data.sources import Source, sample_domains
from headwise.data.streams import stream_blocks
from headwise.data.text import (
    END_OF_TEXT,
    Domain,
    MixedBlocks,
    load_text,
    subdirectories,
    tokenize,
    train_tokenizer,
)
from headwise.recipes.comparison import ComparisonRun, Variant
from headwise.recipes.directory import fingerprint
from headwise.recipes.evaluation import Tokens

Blocks = Dataset[dict[str, Tensor]]
_CURVE_FILES = 16  # of each domain
# Documents of each source of a mixture.
_HELD_OUT, _FOR_TOKENIZER = 200, 2000


class Text(NamedTuple):
    """The run's text in tokens, by domain.

    Attributes:
        tokenizer: Trained on it.
        training: A stream of tokens to train on; of a mixture, what the tokenizer was trained on.
        validation: The held-out files.
        mixture: Where the text is streamed from, and its held-out documents; None where all of it
            is in `training`.
    """

    tokenizer: PreTrainedTokenizerFast
    training: dict[str, Tokens]
    validation: dict[str, dict[str, Tokens]]
    mixture: tuple[Sequence[Source], list[Domain]] | None = None

    def fingerprint(self) -> dict[str, str]:
        """What a run that resumes must find again."""
        return fingerprint({
            domain: [stream, *self.validation[domain].values()]
            for domain, stream in self.training.items()
        })  # fmt: skip


def read_text(run: ComparisonRun) -> Text:
    """The text that `run.data` names, and a tokenizer trained on it.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    sources = find_mixture(run.data)
    domains = (
        load_text(run.data)
        if sources is None
        else sample_domains(sources, held_out=_HELD_OUT, training=_FOR_TOKENIZER)
    )
    bpe = train_tokenizer(domains, vocab_size=run.vocab_size)
    end = bpe.token_to_id(END_OF_TEXT)
    return Text(
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT),
        training={d.name: tokenize(bpe, d.training.values(), end=end) for d in domains},
        validation={
            d.name: {file: tokenize(bpe, [text], end=end) for file, text in d.validation.items()}
            for d in domains
        },
        mixture=None if sources is None else (sources, domains),
    )


def domain_names(data: str | None) -> list[str]:
    """The names of the domains that `read_text` finds, before anything is read."""
    if (sources := find_mixture(data)) is not None:
        return [source.name for source in sources]
    if data is None:
        return ["code", "prose"]
    path = Path(data)
    if not path.is_dir():
        return [path.stem if path.is_file() else data]
    return [p.name for p in subdirectories(path)] or [path.name]


def training_blocks(run: ComparisonRun, text: Text, variant: Variant, seed: int) -> Blocks:
    """What a variant trains on.

    Raises:
        ValueError: If a domain has fewer tokens than one block.
    """
    if text.mixture is not None:
        sources, held_out = text.mixture
        return stream_blocks(
            [s for s in sources if s.name in (variant.train_on or text.training)],
            text.tokenizer.backend_tokenizer,
            sequence_length=run.sequence_length,
            seed=seed,
            end=text.tokenizer.eos_token_id,
            held_out=held_out,
        )
    return MixedBlocks(
        {name: text.training[name] for name in variant.train_on or text.training},
        sequence_length=run.sequence_length,
        num_blocks=run.steps * run.batch_size,
        exponent=run.domain_exponent,
        seed=seed,
    )


def curve_blocks(run: ComparisonRun, text: Text) -> list[dict[str, Tensor]]:
    """For the validation curve: the first block of some held-out files of each domain.

    Raises:
        ValueError: If no file is as long as a block.
    """
    blocks = [
        torch.from_numpy(tokens[: run.sequence_length].astype(np.int64))
        for files in text.validation.values()
        for tokens in [t for t in files.values() if len(t) >= run.sequence_length][:_CURVE_FILES]
    ]
    if not blocks:
        raise ValueError(
            f"sequence_length is {run.sequence_length}, longer than every held-out file"
        )
    return [{"input_ids": block, "labels": block} for block in blocks]
