"""What recipes on images of classes share: their fields, and images with labels as data."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from headwise.data.images import ImageSet
from headwise.data.sampling import draw, spread
from headwise.hf import MoHConfig
from headwise.ops import Routing
from headwise.ops.choice import look_up
from headwise.training.comparison import ComparisonRun, Examples, Task, Variant
from headwise.training.directory import fingerprint
from headwise.training.fields import check_at_least


@dataclass(frozen=True, kw_only=True)
class ImageRun(ComparisonRun):
    """A dense model of images and the same with routed heads.

    Attributes:
        data: Images with classes: None for scikit-learn's digits, a Parquet file, a directory with
            a directory for each class, a dataset's name.
        size: Sizes of the models, by name.
        image_size: Side to which images are cropped and resized; None leaves them.
        active_heads: Of the model with routed heads, the share of heads that are on.
        shared_heads: The share of these that is always on.
        flip: Probability that an image is mirrored.
    """

    # Presets of the model's configuration, by size; what the two models are called.
    sizes: ClassVar[dict[str, str]]
    dense_label: ClassVar[str]
    routed_label: ClassVar[str]

    size: str = "test"
    image_size: int | None = None
    active_heads: float = 0.75
    shared_heads: float = 0.5
    flip: float = 0.0

    def __post_init__(self) -> None:
        look_up("size", self.size, self.sizes)
        if self.image_size is not None:
            check_at_least(1, "image_size", self.image_size)
        for name in ("active_heads", "shared_heads"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1, above 0")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}; it must lie in 0..1")
        super().__post_init__()

    @property
    def preset(self) -> str:
        """Of the model's configuration."""
        return self.sizes[self.size]

    def variants(self) -> list[Variant]:
        """Dense, and routed with `active_heads`."""
        return [self.dense(), self.routed(self.active_heads)]

    def dense(self) -> Variant:
        """The model without routers."""
        return Variant(name="dense", label=self.dense_label)

    def routed(self, active: float, **changes: Any) -> Variant:
        """The model with that share of its heads on, and changes of its attention."""
        percent = f"{100 * active:.0f}"
        fields: dict[str, Any] = {"router": "two_stage", "router_std": 0.02}
        return Variant(
            name=f"moh_{percent}",
            label=f"{self.routed_label}, {percent} %",
            attention=MoHConfig(
                shared=self.shared_heads * active,
                active=active,
                balance_coefficient=self.balance_coefficient,
                **fields | changes,
            ),
            position=100 * active,
        )

    def least_numbers(self) -> tuple[int, dict[str, object]]:
        """Of an image one channel at least."""
        side = self.image_size or 1
        return side**2, {} if side == 1 else {"image_size": side}


@dataclass(frozen=True)
class ImageTask(Task):
    """Images and their classes.

    Attributes:
        run: Whose data they are.
        training: Images with labels.
        validation: Half of the held-out ones, to choose models by.
        test: The other half, which is scored.
    """

    run: ImageRun
    training: ImageSet
    validation: ImageSet
    test: ImageSet
    unit = "image"
    # Of the validation half, those that the validation curve is measured on, at most.
    curve_images: ClassVar[int]

    @property
    def length(self) -> int:
        return 1

    def fingerprint(self) -> dict[str, str]:
        parts = {"training": self.training, "validation": self.validation, "test": self.test}
        return fingerprint({name: [x.pixels, labels_of(x)] for name, x in parts.items()})

    def seen(self) -> Sequence[NDArray[Any]]:
        """What a model is given of the images to train on and of those to validate on."""
        return self.training.pixels, self.validation.pixels

    def datasets(self, variant: Variant, seed: int) -> tuple[Examples, Examples]:
        """Images to train on, each once before one comes again; some to validate on."""
        count, (training, validation) = self.run.steps * self.run.batch_size, self.seen()
        order = draw(len(self.training), count, np.random.default_rng(seed))
        curve = spread(len(self.validation), self.curve_images)
        return (
            LabelledImages(training, labels_of(self.training), order),
            LabelledImages(validation, labels_of(self.validation), curve),
        )


class LabelledImages(Dataset[dict[str, Tensor]]):
    """Images, in pixels [C, S, S] or as latents, with their labels, in an order."""

    def __init__(self, values: NDArray[Any], labels: NDArray[np.int64], order: NDArray[np.int64]):
        self.values, self.labels, self.order = values, labels, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.order[index]
        return {
            "pixel_values": torch.from_numpy(self.values[image]),
            "labels": torch.tensor(self.labels[image]),
        }


def labels_of(images: ImageSet) -> NDArray[np.int64]:
    assert images.labels is not None  # or check_classes had refused them
    return images.labels


def check_classes(data: str | None, images: ImageSet) -> None:
    """Refuse images of which there are not some of each of two classes or more.

    Raises:
        ValueError: Saying what is missing.
    """
    if images.labels is None:
        raise ValueError(f"data {data!r} has no classes; a column 'label' must name them")
    counts = np.bincount(images.labels, minlength=len(images.classes))
    if len(counts) < 2:
        raise ValueError(f"data {data!r} has one class; there must be two or more")
    if not counts.all():
        empty = [name for name, count in zip(images.classes, counts, strict=True) if not count]
        raise ValueError(
            f"data {data!r} has no image to train on of {', '.join(empty[:5])}"
            f"{' and others' if len(empty) > 5 else ''}; each class needs some, or must go"
        )


def class_fields(images: ImageSet) -> dict[str, Any]:
    """The fields of a config that name the images' classes."""
    return {
        "num_labels": len(images.classes),
        "id2label": dict(enumerate(images.classes)),
        "label2id": {name: i for i, name in enumerate(images.classes)},
    }


def only(routings: dict[str, Routing], images: Tensor) -> dict[str, Routing]:
    """The routings with all tokens off of images [B] that are not asked for."""
    return {name: routing.with_mask(images[:, None]) for name, routing in routings.items()}
