"""Language models on text: a run's text in tokens, and what is trained and measured on it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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
from headwise.progress import followed
from headwise.recipes.comparison import TextRun, Variant
from headwise.recipes.directory import RunDirectory, fingerprint
from headwise.recipes.evaluation import (
    RoutingStatistics,
    Tokens,
    file_losses,
    perplexity,
    routed_text,
)
from headwise.recipes.generation import continue_text
from headwise.recipes.loading import load_causal_lm
from headwise.recipes.speed import Timed, time_models
from headwise.recipes.task import Examples, Sample, Scores, Task
from headwise.recipes.variants import build_model, model_flops, model_width

_CURVE_FILES = 16  # of each domain
_PASSAGE_TOKENS = 160
_NEW_TOKENS = 160
# Documents of each source of a mixture.
_HELD_OUT, _FOR_TOKENIZER = 200, 2000


def read_text(run: TextRun) -> "TextTask":
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
    state = PartialState()
    state.print("Training a tokenizer on the text", flush=True)
    bpe = train_tokenizer(
        domains, vocab_size=run.vocab_size, show_progress=state.is_local_main_process
    )
    end = bpe.token_to_id(END_OF_TEXT)

    def shown(domain: Domain) -> Iterable[str]:
        files = domain.training.values()
        title, shown = f"Tokens of {domain.name}", state.is_local_main_process
        return followed(files, title, total=len(files), shown=shown)

    return TextTask(
        run,
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT),
        training={d.name: tokenize(bpe, shown(d), end=end) for d in domains},
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


@dataclass(frozen=True)
class TextTask(Task):
    """The run's text in tokens, by domain.

    Attributes:
        run: Whose text it is.
        tokenizer: Trained on it.
        training: A stream of tokens to train on; of a mixture, what the tokenizer was trained on.
        validation: The held-out files.
        mixture: Where the text is streamed from, and its held-out documents; None where all of it
            is in `training`.
    """

    run: TextRun
    tokenizer: PreTrainedTokenizerFast
    training: dict[str, Tokens]
    validation: dict[str, dict[str, Tokens]]
    mixture: tuple[Sequence[Source], list[Domain]] | None = None

    @property
    def processor(self) -> PreTrainedTokenizerFast:
        return self.tokenizer

    @property
    def length(self) -> int:
        return self.run.sequence_length

    def fingerprint(self) -> dict[str, str]:
        tokens = fingerprint({
            domain: [stream, *self.validation[domain].values()]
            for domain, stream in self.training.items()
        })  # fmt: skip
        return tokens | ({} if self.mixture is None else {"mixture": repr(self.mixture[0])})

    def check(self) -> None:
        variants = self.run.chosen()
        for variant in variants:
            model_width(self.run, variant, vocab_size=len(self.tokenizer))
        for variant in {variant.train_on: variant for variant in variants}.values():
            self._training(variant, self.run.seeds[0])
        self._validation()
        self._prompt()

    def model(self, variant: Variant, seed: int) -> PreTrainedModel:
        return build_model(self.run, variant, vocab_size=len(self.tokenizer), seed=seed)

    def flops(self, model: PreTrainedModel) -> float:
        return model_flops(self.run, model)

    def example(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, self.length, dtype=torch.long, device=model.device)}

    def datasets(self, variant: Variant, seed: int) -> tuple[Examples, Examples]:
        """Blocks of tokens, and the first block of some held-out files of each domain.

        Raises:
            ValueError: If a domain has fewer tokens than one block, or no file has as many.
        """
        return self._training(variant, seed), self._validation()

    def _training(self, variant: Variant, seed: int) -> Examples:
        run, names = self.run, variant.train_on or tuple(self.training)
        if self.mixture is not None:
            sources, held_out = self.mixture
            return stream_blocks(
                [source for source in sources if source.name in names],
                self.tokenizer.backend_tokenizer,
                sequence_length=run.sequence_length,
                seed=seed,
                end=self.tokenizer.eos_token_id,
                held_out=held_out,
            )
        return MixedBlocks(
            {name: self.training[name] for name in names},
            sequence_length=run.sequence_length,
            num_blocks=run.steps * run.batch_size,
            exponent=run.domain_exponent,
            seed=seed,
        )

    def _validation(self) -> list[dict[str, Tensor]]:
        blocks = [
            torch.from_numpy(tokens[: self.length].astype(np.int64))
            for files in self.validation.values()
            for tokens in [x for x in files.values() if len(x) >= self.length][:_CURVE_FILES]
        ]
        if not blocks:
            raise ValueError(f"sequence_length is {self.length}, longer than every held-out file")
        return [{"input_ids": block, "labels": block} for block in blocks]

    def score(self, model: PreTrainedModel) -> Scores:
        statistics = RoutingStatistics(model)
        columns: dict[str, float] = {"eval_blocks_per_file": self.run.eval_blocks_per_file}
        for domain, files in self.validation.items():
            losses = file_losses(
                model,
                files,
                sequence_length=self.length,
                max_blocks=self.run.eval_blocks_per_file,
                observe=partial(statistics.add, domain),
            )
            value, low, high = perplexity(losses)
            columns[f"perplexity_{domain}"] = value
            columns[f"perplexity_{domain}_q1"] = low
            columns[f"perplexity_{domain}_q3"] = high
        heads = statistics.head_loads()
        texts = [
            routed_text(model, self.tokenizer, domain, _passage(files))
            for domain, files in self.validation.items()
            if heads is not None
        ]
        return Scores(columns, heads, statistics.expert_loads(), texts)

    def facts(self) -> dict[str, str]:
        shares = {name: len(tokens) for name, tokens in self.training.items()}
        drawn = "Tokens to draw from" if self.mixture is None else "Tokens of the tokenizer's text"
        return {
            "Text": self.run.data or "Python's library (code) and its reference (prose)",
            drawn: ", ".join(f"{name} {n:,}" for name, n in shares.items()),
            "Held-out files": ", ".join(f"{n} {len(f)}" for n, f in self.validation.items()),
        }

    def speed(self, directory: RunDirectory) -> Timed | None:
        variants, seed = self.run.chosen(), self.run.seeds[0]
        alike = [v for v in variants if v.mlp is None and not v.ternary]
        dense = next((v for v in alike if v.attention is None), None)
        routed = next((v for v in alike if v.attention is not None), None)
        if dense is None or routed is None or not self.run.speed_contexts:
            return None
        models = [load_causal_lm(directory.model(v.name, seed)).eval() for v in (dense, routed)]
        return time_models(*models, contexts=self.run.speed_contexts)

    def sample(self, directory: Path) -> Sample:
        model = load_causal_lm(directory)
        new = min(_NEW_TOKENS, self.length - self._prompt())
        prompt = self.run.sample_prompt
        text = continue_text(
            model, self.tokenizer, prompt, max_new_tokens=new, temperature=0.8, seed=0
        )
        return Sample(prompt, text)

    def _prompt(self) -> int:
        """Tokens of the prompt that the best model continues.

        Raises:
            ValueError: If it has none, or leaves the models nothing to write.
        """
        tokens = len(self.tokenizer(self.run.sample_prompt)["input_ids"])
        if not 0 < tokens < self.length:
            raise ValueError(
                f"sample_prompt has {tokens} tokens; it must have at least 1 and fewer than "
                f"sequence_length = {self.length}"
            )
        return tokens


def _passage(files: dict[str, Tokens]) -> Tokens:
    """From the middle of the longest held-out file."""
    longest = max(files.values(), key=len)
    start = max(0, len(longest) // 2 - _PASSAGE_TOKENS // 2)
    return longest[start : start + _PASSAGE_TOKENS]
