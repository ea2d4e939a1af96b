"""Image classifiers: TransNeXt, and the same with routed heads (MoH-ViT)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil

from headwise.analysis.image_records import RoutedImage
from headwise.data.augmentation import Augmentation, check_augmentation, in_model_range
from headwise.data.images import halve_images, load_images
from headwise.data.sampling import spread
from headwise.hf import record_routing
from headwise.models import TransNeXtConfig, TransNeXtForImageClassification
from headwise.nn import HeadBudget
from headwise.parity import count_flops
from headwise.recipes.images import (
    ImageRun,
    ImageTask,
    LabelledImages,
    check_classes,
    class_fields,
    labels_of,
    only,
)
from headwise.training.comparison import Scores, Variant
from headwise.training.evaluation import RoutingStatistics, count_hits
from headwise.training.fields import check_at_least, check_batch_size
from headwise.training.pictures import routed_images


@dataclass(frozen=True, kw_only=True)
class VisionRun(ImageRun):
    """TransNeXt and MoH-ViT on images of classes, one learning rate and one recipe for both.

    **Source**: MoH, arXiv 2410.11842, section 4.1, with AdamW, warmup and cosine, RandAugment,
    Mixup, CutMix, Random Erasing, label smoothing and DropPath. **Deviates**: the same share of
    heads is on in every stage, as far as whole heads allow; the published models keep all heads of
    their first two stages on (presets "moh-vit-s-75" and its like).

    Attributes:
        size: Sizes of the models: test, micro, tiny, small or base.
        patch_size: Stride of the first patches, in pixels; None is the size's, but an eighth of an
            image at most.
        drop_path: Share of images for which the last branch is left out; None is the size's.
        rand_augment: Magnitude of RandAugment, 0 to 30; 0 leaves it out.
        erase: Probability that a part of an image is erased.
        mixup: Probability that a batch's images are mixed with one another.
        cutmix: Probability that pieces of a batch's images are put into one another.
        smoothing: Label smoothing.
        eval_images: Images that are scored, at most: half of those held out.
    """

    sizes: ClassVar[dict[str, str]] = {"test": "test"} | {
        x: f"transnext-{x}" for x in ("micro", "tiny", "small", "base")
    }
    dense_label = "TransNeXt"
    routed_label = "MoH-ViT"

    output: Path = Path("runs/vit")
    patch_size: int | None = None
    drop_path: float | None = None
    rand_augment: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.5
    smoothing: float = 0.1
    eval_images: int = 10_000
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    weight_decay: float = 0.05
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 200

    def __post_init__(self) -> None:
        if self.patch_size is not None:
            check_at_least(1, "patch_size", self.patch_size)
        if self.drop_path is not None and not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path is {self.drop_path}; it must lie in 0..1, below 1")
        check_at_least(1, "eval_images", self.eval_images)
        check_augmentation(
            self.flip, self.rand_augment, self.erase, self.mixup, self.cutmix, self.smoothing
        )
        super().__post_init__()

    @property
    def recipe(self) -> str:
        return "vit"

    @property
    def title(self) -> str:
        return "Image classifiers with all heads and with some"


def read(run: VisionRun) -> "VisionTask":
    """Load the images that `run.data` names.

    Raises:
        ValueError: If they cannot be used, or have no classes, or a class has no image.
    """
    training, held_out = load_images(run.data, image_size=run.image_size)
    check_classes(run.data, training)
    check_batch_size(run.batch_size, len(training))
    validation, test = halve_images(held_out)
    picks = spread(len(test), run.eval_images)
    return VisionTask(run, training, validation, test.take(picks.tolist()))


@dataclass(frozen=True)
class VisionTask(ImageTask):
    """Images to classify."""

    run: VisionRun
    curve_images = 512
    loss_unit = "nats per image"

    @property
    def processor(self) -> Any:
        _, channels, size, _ = self.training.pixels.shape
        half = [0.5] * channels
        return PvtImageProcessorPil(
            size={"height": size, "width": size}, image_mean=half, image_std=half
        )

    def check(self) -> None:
        self._augmentation()
        with torch.device("meta"):
            for variant in self.run.selected():
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

    def flops_by_module(self, model: TransNeXtForImageClassification) -> dict[str, float]:
        return count_flops(model, image_size=model.config.image_size)

    def example(self, model: TransNeXtForImageClassification) -> dict[str, Tensor]:
        shape = self.training.pixels.shape[1:]
        return {"pixel_values": torch.zeros(1, *shape, device=model.device)}

    def trainer(self, **arguments: Any) -> Any:
        # Imported here: help works without what trains.
        from headwise.training.classification import ImageTrainer

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
        """Accuracy on the test half, and for which classes heads are on."""
        model.eval()
        statistics = RoutingStatistics(model)
        images = self.test
        everything = LabelledImages(images.pixels, labels_of(images), np.arange(len(images)))
        hits = torch.zeros(2, dtype=torch.int64)
        with record_routing(model) as routings:
            for part, batch in enumerate(DataLoader(everything, batch_size=self.run.batch_size)):
                batch = {name: x.to(model.device) for name, x in batch.items()}
                labels = batch["labels"]
                logits = model(in_model_range(batch["pixel_values"].float() / 255)).logits
                hits += count_hits(logits, labels)
                first = part * self.run.batch_size
                places = range(first, first + len(labels))
                for label in labels.unique().tolist():
                    of_class = only(routings, labels == label)
                    statistics.add(self.training.classes[label], of_class, places)
        top1, top5 = (100 * hits / len(images)).tolist()
        return Scores(
            {"top1": top1, "top5": top5, "scored_images": len(images)},
            statistics.head_loads(),
            None,
            texts=[],
            images=self._images(model),
        )

    def _images(self, model: Any) -> list[RoutedImage]:
        def see(picks: list[int]) -> None:
            pixels = torch.from_numpy(self.test.pixels[picks]).to(model.device)
            model(in_model_range(pixels.float() / 255))

        return routed_images(model, self.test, labels_of(self.test), see)

    def facts(self) -> dict[str, str]:
        _, channels, size, _ = self.training.pixels.shape
        return {
            "Images": self.run.data or "scikit-learn's handwritten digits",
            "Of": f"{len(self.training.classes)} classes, {size} × {size} pixels, "
            + ("grey" if channels == 1 else "in colour"),
            "Number": f"{len(self.training)} to train on; held out: {len(self.validation)} for the "
            f"validation curve, {len(self.test)} for the scores",
        }
