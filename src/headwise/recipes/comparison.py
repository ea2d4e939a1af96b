"""A comparison of models: what every such run says of sizes, training and output."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.data.text import check_exponent
from headwise.hf import MoEConfig, MoHConfig
from headwise.memory import check_memory
from headwise.recipes.arguments import (
    Precision,
    check_at_least,
    check_seed,
    check_text,
    check_training,
)

if TYPE_CHECKING:
    from headwise.recipes.task import Task

_OF_A_PROCESS = 2**27  # bytes: torch alone needs more


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model of a comparison: a dense one, and what becomes of its attention and MLPs.

    Attributes:
        name: In files and rows ("mh_moe").
        label: For people ("MH-MoE").
        attention: What `convert` makes of every attention; None leaves it.
        mlp: What `convert` puts for MLPs; None leaves them.
        ternary: Whether all linear maps of its layers have ternary weights (BitNet b1.58).
        train_on: Domains that it trains on; all of them if empty. It is scored on all.
        position: Where it stands on the axis of a study that has one.
    """

    name: str
    label: str
    attention: MoHConfig | None = None
    mlp: MoEConfig | None = None
    ternary: bool = False
    train_on: tuple[str, ...] = ()
    position: float | None = None


@dataclass(frozen=True, kw_only=True)
class ComparisonRun:
    """Models that are trained on the same data in the same way, and compared.

    Attributes:
        output: Directory of the run.
        data: What to train on; None for what is embedded.
        models: Which of the models to train, by name; all of them if empty.
        seeds: Each model is trained once with each.
        workers: Models trained side by side, each in a process of its own: on a GPU of its own, or
            on its share of the processor's cores.
        balance_coefficient: Factor of the balance losses.
        steps: Optimizer steps.
        batch_size: Examples of a step, over all processes.
        device_batch_size: Examples that a process computes at a time; None for all of its share.
        learning_rate: Peak, reached after warmup_steps, cosine to a tenth of it.
        warmup_steps: Steps of linear warmup.
        weight_decay: Of AdamW.
        precision: "fp32", or "bf16" for autocast.
        log_every: Steps between two points of the training curve.
        eval_every: Steps between two points of the validation curve.
        save_every: Steps between two checkpoints.
        report_to: Trackers of transformers' Trainer: tensorboard, trackio, wandb, …
        resume: Go on with the run in the output directory.
        overwrite: Delete the run in the output directory and start anew.
    """

    output: Path = Path("runs/lm")
    data: str | None = None
    models: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    workers: int = 1
    balance_coefficient: float = 0.01
    steps: int = 400
    batch_size: int = 8
    device_batch_size: int | None = None
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    precision: Precision = "fp32"
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    report_to: tuple[str, ...] = field(default=())
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must hold at least one entry")
        for field_name in ("models", "seeds"):
            values = getattr(self, field_name)
            if len(set(values)) < len(values):
                raise ValueError(f"{field_name} is {values}; each entry may occur once")
        for seed in self.seeds:
            check_seed("seeds", seed)
        check_training(self)
        for name in ("steps", "workers"):
            check_at_least(1, name, getattr(self, name))
        check_memory(_OF_A_PROCESS * self.workers, "the processes", workers=self.workers)
        check_at_least(0, "warmup_steps", self.warmup_steps)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        self.chosen()

    @property
    def final_learning_rate(self) -> float:
        """At the last step."""
        return self.learning_rate / 10

    @property
    def title(self) -> str:
        """Of the table and the page."""
        raise NotImplementedError

    @property
    def recipe(self) -> str:
        """Name in rows of results."""
        raise NotImplementedError

    def read(self) -> "Task":
        """Read the data and make them ready.

        Raises:
            ValueError: If there are none, or they cannot be read.
        """
        raise NotImplementedError

    def variants(self) -> list[Variant]:
        """All models of the comparison, in the order of the table.

        Raises:
            ValueError: If one of them cannot be built in these sizes.
        """
        raise NotImplementedError

    def cost_of(self) -> Variant | None:
        """The variant whose FLOPs all others are given; None compares unequal costs."""
        return None

    def chosen(self) -> list[Variant]:
        """The variants that `models` names.

        Raises:
            ValueError: If it names one that the comparison does not have.
        """
        known = {variant.name: variant for variant in self.variants()}
        for name in self.models:
            if name not in known:
                raise ValueError(f"models is {name!r}; it must be one of {', '.join(known)}")
        return [known[name] for name in self.models or known]


@dataclass(frozen=True, kw_only=True)
class LayeredRun(ComparisonRun):
    """Models of equal layers, converted and given the dense one's cost.

    Attributes:
        dim: Width of the models.
        num_layers: Layers.
        num_heads: Attention heads of a layer.
        mlp_dim: Hidden width of the dense model's MLPs, and of a sparse MoE's experts.
        initializer_range: Deviation with which weights start; None is sqrt(2 / (5 · dim))
            (arXiv 1910.05895), 0.02 at the width of 1000.
        num_experts: Experts of the sparse MoE; MH-MoE's number follows from equal parameters.
        top_k: Experts that a token of the sparse MoE goes to.
        every: Experts replace the MLP of each n-th layer.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 8
    mlp_dim: int = 344
    initializer_range: float | None = None
    num_experts: int = 8
    top_k: int = 1
    every: int = 2

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads", "mlp_dim", "every"):
            check_at_least(1, name, getattr(self, name))
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide dim = {self.dim}")
        if self.initializer_range is not None and not 0 < self.initializer_range <= 1:
            raise ValueError(
                f"initializer_range is {self.initializer_range}; it must lie in 0..1, above 0"
            )
        self._check_weights()
        super().__post_init__()
        self._check_experts()

    def _check_weights(self) -> None:
        """In float32; of an MLP two matrices, for not all are gated."""
        sizes = {"dim": self.dim, "num_layers": self.num_layers, "mlp_dim": self.mlp_dim}
        layers = 4 * self.num_layers * (4 * self.dim**2 + 2 * self.dim * self.mlp_dim)
        check_memory(layers, "the weights of the layers", **sizes)
        if (entries := getattr(self, "vocab_size", 0)) > 0:
            embeddings = 4 * entries * self.dim
            check_memory(embeddings, "the embeddings", vocab_size=entries, dim=self.dim)

    def _check_experts(self) -> None:
        """The same, where a model has experts."""
        names = ("num_experts", "dim", "mlp_dim", "num_layers")
        weights = 4 * math.prod(getattr(self, name) for name in names) // self.every
        if any(variant.mlp for variant in self.chosen()):
            sizes = {name: getattr(self, name) for name in names}
            check_memory(weights, "the weights of the experts", **sizes)

    @property
    def initial_deviation(self) -> float:
        """Of the weights of dense layers."""
        return self.initializer_range or (2 / (5 * self.dim)) ** 0.5

    def cost_of(self) -> Variant | None:
        """The first, dense one."""
        return self.variants()[0]


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
        super().__post_init__()
        if (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"num_heads is {self.num_heads}; dim = {self.dim} must be an even multiple of it"
            )

    def read(self) -> "Task":
        # Not above: help on a recipe's fields shall not wait for what reads text.
        from headwise.recipes.text import read_text

        return read_text(self)
