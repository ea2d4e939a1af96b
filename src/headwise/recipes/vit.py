"""Image classifiers: TransNeXt, and the same with routed heads (MoH-ViT)."""

from dataclasses import dataclass
from pathlib import Path

from headwise.data.augmentation import check_augmentation
from headwise.hf import MoHConfig
from headwise.ops.choice import look_up
from headwise.recipes.arguments import check_at_least
from headwise.recipes.comparison import ComparisonRun, Variant
from headwise.recipes.task import Task

# Presets of `TransNeXtConfig`, by size.
SIZES = {
    "test": "test",
    "micro": "transnext-micro",
    "tiny": "transnext-tiny",
    "small": "transnext-small",
    "base": "transnext-base",
}


@dataclass(frozen=True, kw_only=True)
class VisionRun(ComparisonRun):
    """TransNeXt and MoH-ViT on images of classes, one learning rate and one recipe for both.

    **Source**: MoH, arXiv 2410.11842, section 4.1, with AdamW, warmup and cosine, RandAugment,
    Mixup, CutMix, Random Erasing, label smoothing and DropPath. **Deviates**: the same share of
    heads is on in every stage, as far as whole heads allow; the published models keep all heads of
    their first two stages on (presets "moh-vit-s-75" and its like).

    Attributes:
        data: Images with classes: None for scikit-learn's digits, a Parquet file, a directory with
            a directory for each class, a dataset's name.
        size: Sizes of the models: test, micro, tiny, small or base.
        image_size: Side to which images are cropped and resized; None leaves them.
        patch_size: Stride of the first patches, in pixels; None is the size's, but an eighth of an
            image at most.
        active_heads: Of MoH-ViT, the share of heads that are on.
        shared_heads: Of MoH-ViT, the share of these that is always on.
        drop_path: Share of images for which the last branch is left out; None is the size's.
        flip: Probability that an image is mirrored.
        rand_augment: Magnitude of RandAugment, 0 to 30; 0 leaves it out.
        erase: Probability that a part of an image is erased.
        mixup: Probability that a batch's images are mixed with one another.
        cutmix: Probability that pieces of a batch's images are put into one another.
        smoothing: Label smoothing.
        eval_images: Held-out images that count, at most.
    """

    output: Path = Path("runs/vit")
    size: str = "test"
    image_size: int | None = None
    patch_size: int | None = None
    active_heads: float = 0.75
    shared_heads: float = 0.5
    drop_path: float | None = None
    flip: float = 0.0
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
        look_up("size", self.size, SIZES)
        for name in ("image_size", "patch_size"):
            if (value := getattr(self, name)) is not None:
                check_at_least(1, name, value)
        for name in ("active_heads", "shared_heads"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1, above 0")
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

    def variants(self) -> list[Variant]:
        """Dense, and MoH-ViT with `active_heads`."""
        return [Variant(name="dense", label="TransNeXt"), self.routed(self.active_heads)]

    def routed(self, active: float) -> Variant:
        """MoH-ViT with that share of its heads on."""
        percent = f"{100 * active:.0f}"
        return Variant(
            name=f"moh_{percent}",
            label=f"MoH-ViT, {percent} %",
            attention=MoHConfig(
                shared=self.shared_heads * active,
                active=active,
                balance_coefficient=self.balance_coefficient,
            ),
            position=100 * active,
        )

    def read(self) -> Task:
        # Not above: help on a recipe's fields shall not wait for what reads images.
        from headwise.recipes.vit_task import read_images

        return read_images(self)


def vit() -> VisionRun:
    """TransNeXt and MoH-ViT, small ones, on handwritten digits or images of your own."""
    return VisionRun()
