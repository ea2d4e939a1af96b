"""What a recipe does with its data: the steps in which recipes differ, one object for each run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from headwise.analysis.image_records import RoutedImage, SampleGrid
from headwise.analysis.records import ExpertLoads, HeadLoads, RoutedText
from headwise.hf.trainer import SafeTrainer
from headwise.recipes.comparison import ComparisonRun, Variant
from headwise.recipes.directory import RunDirectory
from headwise.recipes.speed import Timed

Examples = Dataset[dict[str, Tensor]] | list[dict[str, Tensor]]


class Scores(NamedTuple):
    """What a trained model is worth on what was held out, and who does the work.

    Attributes:
        columns: Of its row; those that `recipes.measures` knows are compared.
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

    It holds nothing that a process of its own could not be given (pickled).

    Attributes:
        run: Whose data they are.
        unit: What costs and speeds are given for, and what the data are counted in.
        loss_unit: Of the loss curves.
        processor: Makes a model's inputs of what people have: a tokenizer, an image processor. It
            is saved beside the weights.
    """

    run: ComparisonRun
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
    def flops(self, model: Any) -> float:
        """Of a forward, per unit, by formula."""

    @abstractmethod
    def example(self, model: Any) -> dict[str, Tensor]:
        """Arguments of a forward on one example of full length, on the model's device."""

    @abstractmethod
    def datasets(self, variant: Variant, seed: int) -> tuple[Examples, Examples]:
        """What a variant trains on, and what its validation curve is measured on."""

    @abstractmethod
    def score(self, model: Any) -> Scores:
        """What a trained model is worth."""

    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """What the page says of the data."""

    def trainer(self, **arguments: Any) -> SafeTrainer:
        """What trains a model."""
        return SafeTrainer(**arguments)

    def speed(self, directory: RunDirectory) -> Timed | None:
        """Dense against routed heads, of the saved models; None where there is nothing to time."""
        return None

    def sample(self, directory: Path) -> Sample | None:
        """What the saved model writes; None where there is nothing to write."""
        return None
