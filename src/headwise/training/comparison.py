"""A comparison: models trained on the same data in the same way, and what a recipe adds to that.

A recipe is the fields of a run (`ComparisonRun`), which say what is trained, and a task (`Task`),
which holds the data and builds, trains and measures one model. `training.train` gets both.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from headwise.analysis.image_records import RoutedImage, SampleGrid
from headwise.analysis.records import ExpertLoads, HeadLoads, RoutedText
from headwise.hf import MoEConfig, MoHConfig
from headwise.memory import check_memory
from headwise.ops.choice import check_choice
from headwise.training.fields import Stage, TrainingRun, check_at_least, check_seed
from headwise.training.speed import Timed

Protocol = Literal["fair", "plain"]
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
        num_heads: Attention heads of each layer, as wide as those of the run's other models: the
            same ones for every token, nothing routed. None is the run's number.
        head_dims: Channels of each head of a layer, in a model of text whose attentions are
            `MoHAttention` where `attention` says so, and dense otherwise; its MLPs are dense. Empty
            for heads that are all as wide as the run's.
        train_on: Domains that it trains on; all of them if empty. It is scored on all.
        position: Where it stands on the axis of a study that has one.
        series: Which of the lines over that axis it is a point of, where there are several.
    """

    name: str
    label: str
    attention: MoHConfig | None = None
    mlp: MoEConfig | None = None
    ternary: bool = False
    num_heads: int | None = None
    head_dims: tuple[int, ...] = ()
    train_on: tuple[str, ...] = ()
    position: float | None = None
    series: str = ""


class Training(NamedTuple):
    """One training of a comparison.

    Attributes:
        variant: The model.
        seed: Of its weights and of the order of the data.
        rate: Peak of the learning rate, where that is the model's own; None is the run's.
    """

    variant: Variant
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its files."""
        own = "" if self.rate is None else f"-lr{self.rate:g}"
        return f"{self.variant.name}-seed{self.seed}{own}"

    @property
    def label(self) -> str:
        """For people."""
        own = "" if self.rate is None else f", learning rate {self.rate:g}"
        return f"{self.variant.label}, seed {self.seed}{own}"


@dataclass(frozen=True, kw_only=True)
class ComparisonRun(TrainingRun):
    """Models that are trained on the same data in the same way, and compared.

    Attributes:
        protocol: "fair" trains each model at the learning rate that is best for it, of a grid
            around learning_rate that widens until the best one is inside, and scores it after a
            third of its steps as well; "plain" trains all at learning_rate.
        models: Which of the models to train, by name; all of them if empty.
        seeds: Each model is trained once with each; learning rates are tried with the first one.
        expected: What is expected to come out, written before; it stands on the page.
        workers: Models trained side by side, each in a process of its own: on a GPU of its own, or
            on its share of the processor's cores.
        balance_coefficient: Factor of the balance losses.
        steps: Optimizer steps.
        learning_rate: Peak, reached after warmup_steps, cosine to a tenth of it.
        warmup_steps: Steps of linear warmup.
    """

    everyday: ClassVar[tuple[str, ...]] = (
        "output", "data", "protocol", "models", "seeds", "workers", "steps", "batch_size",
        "learning_rate", "resume", "overwrite",
    )  # fmt: skip

    protocol: Protocol = "plain"
    models: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    expected: str = ""
    workers: int = 1
    balance_coefficient: float = 0.01
    steps: int = 400
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_steps: int = 40

    def __post_init__(self) -> None:
        check_choice("protocol", self.protocol, Protocol)
        if not self.seeds:
            raise ValueError("seeds must hold at least one entry")
        for field_name in ("models", "seeds"):
            values = getattr(self, field_name)
            if len(set(values)) < len(values):
                raise ValueError(f"{field_name} is {values}; each entry may occur once")
        for seed in self.seeds:
            check_seed("seeds", seed)
        super().__post_init__()
        for name in ("steps", "workers"):
            check_at_least(1, name, getattr(self, name))
        check_memory(_OF_A_PROCESS * self.workers, "the processes", workers=self.workers)
        check_at_least(0, "warmup_steps", self.warmup_steps)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        self.selected()

    @property
    def total_steps(self) -> int:
        return self.steps

    @property
    def final_learning_rate(self) -> float:
        """At the last step."""
        return self.learning_rate / 10

    @property
    def early_steps(self) -> int | None:
        """Steps after which a model is scored for the first time; None scores it at its end."""
        return self.steps // 3 or None if self.protocol == "fair" else None

    @property
    def stage(self) -> Stage:
        """All of the training."""
        return Stage(
            steps=self.steps,
            learning_rate=self.learning_rate,
            final_learning_rate=self.final_learning_rate,
            warmup_steps=self.warmup_steps,
        )

    @property
    def title(self) -> str:
        """Of the table and the page."""
        raise NotImplementedError

    @property
    def recipe(self) -> str:
        """Name in rows of results."""
        raise NotImplementedError

    @property
    def axis(self) -> str | None:
        """What `Variant.position` is; None where the models stand on no axis."""
        return None

    def variants(self) -> list[Variant]:
        """All models of the comparison, in the order of the table.

        Raises:
            ValueError: If one of them cannot be built in these sizes.
        """
        raise NotImplementedError

    def cost_of(self) -> Variant | None:
        """The variant whose FLOPs all others are given; None compares unequal costs."""
        return None

    def share_of_heads(self, variant: Variant) -> float:
        """The attention heads that a layer of the model has, over those of the run's layers."""
        return 1.0

    def selected(self) -> list[Variant]:
        """The variants that `models` names.

        Raises:
            ValueError: If it names one that the comparison does not have.
        """
        known = {variant.name: variant for variant in self.variants()}
        for name in self.models:
            if name not in known:
                raise ValueError(f"models is {name!r}; it must be one of {', '.join(known)}")
        return [known[name] for name in self.models or known]


Examples = Dataset[dict[str, Tensor]] | list[dict[str, Tensor]]


class Scores(NamedTuple):
    """What a trained model is worth on what was held out, and who does the work.

    Attributes:
        columns: Of its row; those that `training.measures` knows are compared.
        heads, experts, texts, images, samples: As in `ModelRecord`.
    """

    columns: dict[str, float]
    heads: HeadLoads | None
    experts: ExpertLoads | None
    texts: list[RoutedText]
    images: Sequence[RoutedImage] = ()
    samples: SampleGrid | None = None


class Sample(NamedTuple):
    """A text that a model wrote."""

    prompt: str
    text: str


class Task(ABC):
    """The data of a run, made ready, and what is built, trained and measured on them.

    A worker process is given a pickled copy.

    Attributes:
        unit: What costs and speeds are given for, and what the data are counted in.
        loss_unit: Of the loss curves.
        processor: Makes a model's inputs of what people have: a tokenizer, an image processor. It
            is saved beside the weights.
    """

    unit = "token"
    loss_unit = "nats per token"

    @property
    @abstractmethod
    def processor(self) -> Any: ...

    @property
    @abstractmethod
    def length(self) -> int:
        """Units (tokens, or one image) of an example."""

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Of the data: what a run that resumes must find again."""

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if the run cannot be carried out on these data."""

    @abstractmethod
    def model(self, variant: Variant, seed: int) -> Any:
        """The model of a variant, untrained."""

    @abstractmethod
    def flops_by_module(self, model: Any) -> dict[str, float]:
        """Of a forward, per unit, by formula."""

    def flops(self, model: Any) -> float:
        """Of all modules."""
        return sum(self.flops_by_module(model).values())

    @abstractmethod
    def example(self, model: Any) -> dict[str, Tensor]:
        """Arguments of a forward on one example of full length, on the model's device."""

    @abstractmethod
    def datasets(self, variant: Variant, seed: int) -> tuple[Examples, Examples]:
        """What a variant trains on; the validation half of what is held out, for its curve."""

    @abstractmethod
    def score(self, model: Any) -> Scores:
        """What a model is worth on the test half of what is held out."""

    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """What the page says of the data."""

    def trainer(self, **arguments: Any) -> Any:
        """What trains a model: a `SafeTrainer`."""
        # Imported here: help works without what trains.
        from headwise.training.trainer import SafeTrainer

        return SafeTrainer(**arguments)

    def speed(self, models: Mapping[str, Path]) -> Timed | None:
        """Dense against routed heads; None where there is nothing to time.

        `models` are the saved ones of one seed, by the names of their variants.
        """
        return None

    def sample(self, directory: Path) -> Sample | None:
        """What the saved model writes; None where there is nothing to write."""
        return None
