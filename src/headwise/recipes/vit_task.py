"""Classifying images: a run's images made ready, and what is trained and measured on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil

from headwise.analysis.image_records import RoutedImage
from headwise.data.augmentation import Augmentation
from headwise.data.images import ImageSet, load_images
from headwise.data.sampling import draw, spread
from headwise.hf import record_routing
from headwise.hf.trainer import SafeTrainer
from headwise.models import TransNeXtConfig, TransNeXtForImageClassification
from headwise.nn import HeadBudget
from headwise.ops import Routing
from headwise.parity import count_flops
from headwise.recipes.arguments import check_batch_size
from headwise.recipes.classification import count_hits
from headwise.recipes.comparison import Variant
from headwise.recipes.directory import fingerprint
from headwise.recipes.evaluation import RoutingStatistics
from headwise.recipes.pictures import routed_images
from headwise.recipes.task import Examples, Scores, Task
from headwise.recipes.vit import VisionRun

_CURVE_IMAGES = 512


def read_images(run: VisionRun) -> "VisionTask":
    """Load the images that `run.data` names.

    Raises:
        ValueError: If they cannot be used, or have no classes, or a class has no image.
    """
    training, validation = load_images(run.data, image_size=run.image_size)
    check_classes(run.data, training)
    check_batch_size(run.batch_size, len(training))
    picks = spread(len(validation), run.eval_images)
    return VisionTask(run, training, validation.take(picks.tolist()))


@dataclass(frozen=True)
class VisionTask(Task):
    """Images and their classes.

    Attributes:
        run: Whose data they are.
        training, validation: Images with labels.
    """

    run: VisionRun
    training: ImageSet
    validation: ImageSet
    unit = "image"
    loss_unit = "nats per image"

    @property
    def processor(self) -> Any:
        _, channels, size, _ = self.training.pixels.shape
        half = [0.5] * channels
        return PvtImageProcessorPil(
            size={"height": size, "width": size}, image_mean=half, image_std=half
        )

    @property
    def length(self) -> int:
        return 1

    def fingerprint(self) -> dict[str, str]:
        parts = {"training": self.training, "validation": self.validation}
        return fingerprint({name: [x.pixels, labels_of(x)] for name, x in parts.items()})

    def check(self) -> None:
        self._augmentation()
        with torch.device("meta"):
            for variant in self.run.chosen():
                TransNeXtForImageClassification(self.config(variant.attention))

    def model(self, variant: Variant, seed: int) -> TransNeXtForImageClassification:
        torch.manual_seed(seed)
        return TransNeXtForImageClassification(self.config(variant.attention))

    def config(self, attention: Any) -> TransNeXtConfig:
        """Sizes of a variant. Patches are those of the size, but an eighth of the image at most."""
        run, (_, channels, size, _) = self.run, self.training.pixels.shape
        dense = TransNeXtConfig.preset(run.preset)
        changes: dict[str, Any] = {
            "image_size": size,
            "pretrain_size": size,
            "num_channels": channels,
            "patch_size": run.patch_size or max(1, min(dense.patch_size, size // 8)),
            **class_fields(self.training),
        }
        if run.drop_path is not None:
            changes["drop_path_rate"] = run.drop_path
        if attention is not None:
            budgets = [
                HeadBudget.resolve(heads, shared=attention.shared, active=attention.active)
                for heads in dense.num_heads
            ]
            changes["shared_heads"] = [budget.shared_heads for budget in budgets]
            changes["active_heads"] = [budget.active_heads for budget in budgets]
            changes["balance_coefficient"] = attention.balance_coefficient
        return TransNeXtConfig.preset(run.preset, **changes)

    def flops(self, model: TransNeXtForImageClassification) -> float:
        return sum(count_flops(model, image_size=model.config.image_size).values())

    def example(self, model: TransNeXtForImageClassification) -> dict[str, Tensor]:
        shape = self.training.pixels.shape[1:]
        return {"pixel_values": torch.zeros(1, *shape, device=model.device)}

    def datasets(self, variant: Variant, seed: int) -> tuple[Examples, Examples]:
        """Images to train on, each once before one comes again; some of the held-out ones."""
        run = self.run
        order = draw(len(self.training), run.steps * run.batch_size, np.random.default_rng(seed))
        curve = spread(len(self.validation), _CURVE_IMAGES)
        training, validation = self.training, self.validation
        return (
            LabelledImages(training.pixels, labels_of(training), order),
            LabelledImages(validation.pixels, labels_of(validation), curve),
        )

    def trainer(self, **arguments: Any) -> SafeTrainer:
        return ImageTrainer(augmentation=self._augmentation(), **arguments)

    def _augmentation(self) -> Augmentation:
        run = self.run
        return Augmentation(
            len(self.training.classes),
            flip=run.flip,
            rand_augment=run.rand_augment,
            erase=run.erase,
            mixup=run.mixup,
            cutmix=run.cutmix,
            smoothing=run.smoothing,
        )

    @torch.no_grad()
    def score(self, model: Any) -> Scores:
        """Accuracy on the held-out images, and for which classes heads are on."""
        model.eval()
        statistics = RoutingStatistics(model)
        images = self.validation
        everything = LabelledImages(images.pixels, labels_of(images), np.arange(len(images)))
        hits = torch.zeros(2, dtype=torch.int64)
        with record_routing(model) as routings:
            for batch in DataLoader(everything, batch_size=self.run.batch_size):
                batch = {name: x.to(model.device) for name, x in batch.items()}
                labels = batch["labels"]
                logits = model(in_model_range(batch["pixel_values"].float() / 255)).logits
                hits += count_hits(logits, labels)
                for label in labels.unique().tolist():
                    statistics.add(self.training.classes[label], only(routings, labels == label))
        top1, top5 = (100 * hits / len(self.validation)).tolist()
        return Scores(
            {"top1": top1, "top5": top5},
            statistics.head_loads(),
            None,
            texts=[],
            images=self._images(model),
        )

    def _images(self, model: Any) -> list[RoutedImage]:
        def see(picks: list[int]) -> None:
            pixels = torch.from_numpy(self.validation.pixels[picks]).to(model.device)
            model(in_model_range(pixels.float() / 255))

        return routed_images(model, self.validation, labels_of(self.validation), see)

    def facts(self) -> dict[str, str]:
        _, channels, size, _ = self.training.pixels.shape
        return {
            "Images": self.run.data or "scikit-learn's handwritten digits",
            "Of": f"{len(self.training.classes)} classes, {size} × {size} pixels, "
            + ("grey" if channels == 1 else "in colour"),
            "Number": f"{len(self.training)} to train on, {len(self.validation)} held out",
        }


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


class ImageTrainer(SafeTrainer):
    """Changes images at random, on their device, before the model trains on them."""

    def __init__(self, *args: Any, augmentation: Augmentation, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.augmentation = augmentation

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Of images in uint8 and labels."""
        images, labels = inputs["pixel_values"].float() / 255, inputs["labels"]
        if model.training:
            images, labels = self.augmentation(images, labels)
        changed = {"pixel_values": in_model_range(images), "labels": labels}
        return super().compute_loss(model, changed, *args, **kwargs)


def labels_of(images: ImageSet) -> NDArray[np.int64]:
    assert images.labels is not None  # or read_images had refused them
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


def in_model_range(images: Tensor) -> Tensor:
    """0..1 → -1..1, as the image processor does."""
    return 2 * images - 1


def only(routings: dict[str, Routing], images: Tensor) -> dict[str, Routing]:
    """The routings with all tokens off of images [B] that are not asked for."""
    return {name: routing.with_mask(images[:, None]) for name, routing in routings.items()}
