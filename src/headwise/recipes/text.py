"""Text, made ready for runs on it: what recipes and studies of text share."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from headwise.data.mixtures import find_mixture
from headwise.data.sources import Source, sample_domains
from headwise.data.streams import BlockStream
from headwise.data.text import (
    END_OF_TEXT,
    Domain,
    MixedBlocks,
    halve,
    load_text,
    some_blocks,
    subdirectories,
    tokenize,
    train_tokenizer,
)
from headwise.data.token_files import Tokens
from headwise.data.typos import mistype_tokens
from headwise.loading import load_causal_lm
from headwise.parity import count_flops
from headwise.progress import followed
from headwise.recipes.decoders import TextRun, build_model, model_width
from headwise.training.comparison import Examples, Sample, Scores, Task, Variant
from headwise.training.directory import fingerprint
from headwise.training.evaluation import RoutingStatistics, file_losses, perplexity, routed_text
from headwise.training.generation import continue_text
from headwise.training.speed import Timed, time_models

_CURVE_BLOCKS = 64  # of each domain
_PASSAGE_TOKENS = 160
_NEW_TOKENS = 160
_EQUAL_COST = (
    "The models cost equal FLOPs at the length they were trained on: MoH's MLPs are wider by what "
    "its heads save."
)
# Documents of each source of a mixture.
_HELD_OUT, _FOR_TOKENIZER = 200, 2000


def read(run: TextRun) -> "TextTask":
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

    parts = {
        d.name: halve({name: tokenize(bpe, [x], end=end) for name, x in d.held_out.items()})
        for d in domains
    }
    return TextTask(
        run,
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT),
        training={d.name: tokenize(bpe, shown(d), end=end) for d in domains},
        validation={name: validation for name, (validation, _) in parts.items()},
        test={name: test for name, (_, test) in parts.items()},
        mixture=None if sources is None else (sources, domains),
    )


@dataclass(frozen=True)
class TextTask(Task):
    """The run's text in tokens, by domain.

    Attributes:
        run: Whose text it is.
        tokenizer: Trained on it.
        training: A stream of tokens to train on; of a mixture, what the tokenizer was trained on.
        validation: Half of the held-out files, to choose models by.
        test: The other half, which is scored.
        mixture: Where the text is streamed from, and its held-out documents; None where all of it
            is in `training`.
    """

    run: TextRun
    tokenizer: PreTrainedTokenizerFast
    training: dict[str, Tokens]
    validation: dict[str, dict[str, Tokens]]
    test: dict[str, dict[str, Tokens]]
    mixture: tuple[Sequence[Source], list[Domain]] | None = None

    @property
    def processor(self) -> PreTrainedTokenizerFast:
        return self.tokenizer

    @property
    def length(self) -> int:
        return self.run.sequence_length

    def fingerprint(self) -> dict[str, str]:
        tokens = fingerprint({
            domain: [stream, *self.validation[domain].values(), *self.test[domain].values()]
            for domain, stream in self.training.items()
        })  # fmt: skip
        return tokens | ({} if self.mixture is None else {"mixture": repr(self.mixture[0])})

    def check(self) -> None:
        variants = self.run.selected()
        for variant in variants:
            model_width(self.run, variant, vocab_size=len(self.tokenizer))
        for variant in {variant.train_on: variant for variant in variants}.values():
            self._training(variant, self.run.seeds[0])
        self._curve()
        self._check_test()
        self._prompt()

    def model(self, variant: Variant, seed: int) -> PreTrainedModel:
        return build_model(self.run, variant, vocab_size=len(self.tokenizer), seed=seed)

    def flops_by_module(self, model: PreTrainedModel) -> dict[str, float]:
        return count_flops(model, sequence_length=self.length)

    def example(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, self.length, dtype=torch.long, device=model.device)}

    def datasets(self, variant: Variant, seed: int) -> tuple[Examples, Examples]:
        """Blocks of tokens, and of each domain some of its validation half.

        Raises:
            ValueError: If a domain has fewer tokens than one block, or no file of the validation
                half has as many.
        """
        return self._training(variant, seed), self._curve()

    def _training(self, variant: Variant, seed: int) -> Examples:
        run, names = self.run, variant.train_on or tuple(self.training)
        if self.mixture is not None:
            sources, held_out = self.mixture
            return BlockStream(
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

    def _curve(self) -> list[dict[str, Tensor]]:
        """Full blocks of the validation half, spread over all of each domain."""
        blocks = [
            torch.from_numpy(block.astype(np.int64))
            for files in self.validation.values()
            for block in some_blocks(files.values(), self.length, most=_CURVE_BLOCKS)
        ]
        if not blocks:
            lengths = [len(x) for files in self.validation.values() for x in files.values()]
            raise ValueError(
                f"sequence_length is {self.length}, longer than every file to validate on; the "
                f"longest has {max(lengths, default=0)} tokens"
            )
        return [{"input_ids": block, "labels": block} for block in blocks]

    def _check_test(self) -> None:
        """Raises ValueError if there is nothing to score of a domain."""
        for domain, files in self.test.items():
            if max(map(len, files.values())) < 2:
                raise ValueError(
                    f"data holds out too little of domain {domain!r}: one file of 2 tokens; to "
                    "validate and to score, it takes 3 or more"
                )

    def score(self, model: PreTrainedModel) -> Scores:
        statistics = RoutingStatistics(model)
        columns: dict[str, float] = {"eval_blocks_per_file": self.run.eval_blocks_per_file}
        for domain, files in self._scored():
            # Mistyped, a file is no document of its own.
            counted = domain in self.test
            losses = file_losses(
                model,
                files,
                sequence_length=self.length,
                max_blocks=self.run.eval_blocks_per_file,
                observe=partial(statistics.add, domain) if counted else lambda *_: None,
            )
            value, low, high = perplexity(losses)
            columns[f"perplexity_{domain}"] = value
            columns[f"perplexity_{domain}_q1"] = low
            columns[f"perplexity_{domain}_q3"] = high
            columns[f"scored_files_{domain}"] = len(losses)
            columns[f"scored_tokens_{domain}"] = sum(loss.tokens for loss in losses)
        heads = statistics.head_loads()
        texts = [
            routed_text(model, self.tokenizer, domain, _passage(files))
            for domain, files in self.test.items()
            if heads is not None
        ]
        return Scores(columns, heads, statistics.expert_loads(), texts)

    def _scored(self) -> Iterator[tuple[str, dict[str, Tokens]]]:
        """The scored files of each domain, as they are and mistyped ("code_typos_5", in %)."""
        bpe, end = self.tokenizer.backend_tokenizer, self.tokenizer.eos_token_id
        for domain, files in self.test.items():
            yield domain, files
            for share in self.run.typos:
                typed = {k: mistype_tokens(bpe, x, share, end=end) for k, x in files.items()}
                yield f"{domain}_typos_{100 * share:g}", typed

    def facts(self) -> dict[str, str]:
        shares = {name: len(tokens) for name, tokens in self.training.items()}
        drawn = "Tokens to draw from" if self.mixture is None else "Tokens of the tokenizer's text"
        return {
            "Text": self.run.data or "Python's library (code) and its reference (prose)",
            drawn: ", ".join(f"{name} {n:,}" for name, n in shares.items()),
            "Held out, for the validation curve": _amounts(self.validation),
            "Held out, for the scores": _amounts(self.test),
        }

    def speed(self, models: Mapping[str, Path]) -> Timed | None:
        variants = self.run.selected()
        alike = [v for v in variants if not (v.mlp or v.ternary or v.num_heads or v.head_dims)]
        dense = next((v for v in alike if v.attention is None), None)
        routed = next((v for v in alike if v.attention is not None), None)
        if dense is None or routed is None or not self.run.speed_contexts:
            return None
        loaded = [load_causal_lm(models[v.name]).eval() for v in (dense, routed)]
        timed = time_models(*loaded, contexts=self.run.speed_contexts)
        return timed._replace(note=f"{timed.note} {_EQUAL_COST}") if timed.speeds else timed

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


def domain_names(data: str | None) -> list[str]:
    """The names of the domains that `read` finds, before anything is read."""
    if (sources := find_mixture(data)) is not None:
        return [source.name for source in sources]
    if data is None:
        return ["code", "prose"]
    path = Path(data)
    if not path.is_dir():
        return [path.stem if path.is_file() else data]
    return [p.name for p in subdirectories(path)] or [path.name]


def _amounts(domains: dict[str, dict[str, Tokens]]) -> str:
    return "; ".join(
        f"{domain} {len(files)} files, {sum(map(len, files.values())):,} tokens"
        for domain, files in domains.items()
    )


def _passage(files: dict[str, Tokens]) -> Tokens:
    """From the middle of the longest file."""
    longest = max(files.values(), key=len)
    start = max(0, len(longest) // 2 - _PASSAGE_TOKENS // 2)
    return longest[start : start + _PASSAGE_TOKENS]
