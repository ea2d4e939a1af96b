"""Image classifiers: TransNeXt, and the same with routed heads (MoH-ViT)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from headwise.data.augmentation import check_augmentation
from headwise.recipes.arguments import check_at_least
from headwise.recipes.image_run import ImageRun
from headwise.recipes.task import Task


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
        eval_images: Held-out images that count, at most.
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

    def read(self) -> Task:
        # Not above: help on a recipe's fields shall not wait for what reads images.
        from headwise.recipes.vit_task import read_images

        return read_images(self)


def vit() -> VisionRun:
    """TransNeXt and MoH-ViT, small ones, on handwritten digits or images of your own."""
    return VisionRun()
