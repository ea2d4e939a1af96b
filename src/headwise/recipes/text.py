"""Language models of Llama's layout on text: what recipes and studies of text share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
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
    check_exponent,
    load_text,
    subdirectories,
    tokenize,
    train_tokenizer,
)
from headwise.data.token_files import Tokens
from headwise.loading import load_causal_lm
from headwise.memory import check_memory
from headwise.parity import count_flops
from headwise.progress import followed
from headwise.recipes.layered import LayeredRun, convert_variant, equal_width
from headwise.training.comparison import Examples, Sample, Scores, Task, Variant
from headwise.training.directory import fingerprint
from headwise.training.evaluation import RoutingStatistics, file_losses, perplexity, routed_text
from headwise.training.fields import check_at_least, check_text
from headwise.training.generation import continue_text
from headwise.training.speed import Timed, time_models

_CURVE_FILES = 16  # of each domain
_PASSAGE_TOKENS = 160
_NEW_TOKENS = 160
_EQUAL_COST = (
    "The models cost equal FLOPs at the length they were trained on: MoH's MLPs are wider by what "
    "its heads save."
)
# Documents of each source of a mixture.
_HELD_OUT, _FOR_TOKENIZER = 200, 2000


@dataclass(frozen=True, kw_only=True)
class TextRun(LayeredRun):
    """Language models, of Llama's layout, that are compared on text.

    Attributes:
        data: Text: None for what every Python carries, a file, a directory, a dataset's name; or a
            mixture of datasets to stream: "moh-llm", "red-pajama", or a file of sources whose name
            ends in .mixture.json.
        vocab_size: Entries of the tokenizer that is trained on the text.
        sequence_length: Tokens that a model sees at once.
        domain_exponent: A domain of n tokens is drawn with weight n^domain_exponent.
        eval_blocks_per_file: Blocks of a held-out file that count, spread over it.
        sample_prompt: What the best model continues in the report.
        speed_contexts: Tokens of context at which the dense model and the one with routed heads are
            timed after training, where the run has both; empty leaves it out.
    """

    output: Path = Path("runs/lm")
    vocab_size: int = 4096
    sequence_length: int = 256
    domain_exponent: float = 0.5
    eval_blocks_per_file: int = 4
    sample_prompt: str = "def "
    speed_contexts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_at_least(1, "eval_blocks_per_file", self.eval_blocks_per_file)
        check_at_least(2, "sequence_length", self.sequence_length)
        check_at_least(257, "vocab_size", self.vocab_size)  # every byte, and the end of a text
        check_exponent("domain_exponent", self.domain_exponent)
        check_text("sample_prompt", self.sample_prompt)
        for context in self.speed_contexts:
            check_at_least(1, "speed_contexts", context)
            check_memory(8 * context, "the tokens to time", speed_contexts=context)
        embeddings = 4 * self.vocab_size * self.dim
        check_memory(embeddings, "the embeddings", vocab_size=self.vocab_size, dim=self.dim)
        super().__post_init__()
        if (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads is {self.num_heads}; dim = {self.dim} must be an even multiple of it"
            )

    def least_numbers(self) -> tuple[int, dict[str, object]]:
        """Every layer keeps its input of each token, for the backward pass."""
        numbers, fields = super().least_numbers()
        length = self.sequence_length
        return length * numbers, {"sequence_length": length, **fields}


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
        variants = self.run.selected()
        for variant in variants:
            model_width(self.run, variant, vocab_size=len(self.tokenizer))
        for variant in {variant.train_on: variant for variant in variants}.values():
            self._training(variant, self.run.seeds[0])
        self._validation()
        self._prompt()

    def model(self, variant: Variant, seed: int) -> PreTrainedModel:
        return build_model(self.run, variant, vocab_size=len(self.tokenizer), seed=seed)

    def flops_by_module(self, model: PreTrainedModel) -> dict[str, float]:
        return count_flops(model, sequence_length=self.length)

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

    def _validation(self) -> list[dict[str, Tensor]]:
        blocks = [
            torch.from_numpy(tokens[: self.length].astype(np.int64))
            for files in self.validation.values()
            for tokens in [x for x in files.values() if len(x) >= self.length][:_CURVE_FILES]
        ]
        if not blocks:
            lengths = [len(x) for files in self.validation.values() for x in files.values()]
            raise ValueError(
                f"sequence_length is {self.length}, longer than every held-out file; the longest "
                f"has {max(lengths, default=0)} tokens"
            )
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

    def speed(self, models: Mapping[str, Path]) -> Timed | None:
        alike = [v for v in self.run.selected() if v.mlp is None and not v.ternary]
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


def build_model(run: TextRun, variant: Variant, *, vocab_size: int, seed: int) -> PreTrainedModel:
    """The language model of a variant, with the FLOPs per token of the run's `cost_of`.

    Raises:
        ValueError: If no width of the dense MLPs gives that cost.
    """
    width = model_width(run, variant, vocab_size=vocab_size)
    torch.manual_seed(seed)
    return _assemble(run, variant, width, vocab_size, device="cpu")


def model_width(run: TextRun, variant: Variant, *, vocab_size: int) -> int:
    """The width of a variant's dense MLPs. Nothing is built but on the meta device.

    Raises:
        ValueError: If no width gives that cost, or the model cannot be built.
    """

    def flops(variant: Variant, width: int) -> float:
        return model_flops(run, _assemble(run, variant, width, vocab_size))

    width = equal_width(run, variant, flops)
    _assemble(run, variant, width, vocab_size)
    return width


def model_flops(run: TextRun, model: PreTrainedModel) -> float:
    """Of a forward, per token, by formula."""
    return sum(count_flops(model, sequence_length=run.sequence_length).values())


def _assemble(
    run: TextRun, variant: Variant, mlp_dim: int, vocab_size: int, *, device: str = "meta"
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=run.dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=run.num_layers,
        num_attention_heads=run.num_heads,
        max_position_embeddings=run.sequence_length,
        initializer_range=run.initial_deviation,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(device):
        return convert_variant(run, variant, LlamaForCausalLM(config))


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


def _passage(files: dict[str, Tokens]) -> Tokens:
    """From the middle of the longest held-out file."""
    longest = max(files.values(), key=len)
    start = max(0, len(longest) // 2 - _PASSAGE_TOKENS // 2)
    return longest[start : start + _PASSAGE_TOKENS]
