"""Images from noise: diffusion transformers, and the same with routed heads (MoH-DiT)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from headwise.memory import check_memory
from headwise.recipes.arguments import check_at_least, check_guidance
from headwise.recipes.image_run import ImageRun
from headwise.recipes.task import Task


@dataclass(frozen=True, kw_only=True)
class DiffusionRun(ImageRun):
    """DiT and MoH-DiT on images of classes: AdamW at a constant learning rate, averaged weights.

    What is saved, sampled from and measured are the averaged weights.

    **Source**: MoH, arXiv 2410.11842, section 4.2, in the manner of DiT, arXiv 2212.09748.
    **Deviates**: the same share of heads is on in every layer, as far as whole heads allow
    (presets "moh-dit-s-75" and its like have the published budgets); pixels where no VAE is given.

    Attributes:
        size: Sizes of the models: test, s, b, l or xl.
        vae: Directory or name of diffusers' AutoencoderKL, to whose latents all images are brought
            once; None trains on pixels.
        class_dropout: Share of labels that training leaves out, for guidance.
        averaging: Share that the averaged weights keep of themselves in a step, at most; at first
            it is less.
        guidance_scale: Of the samples that are measured, 0 or more; 1 is none.
        sampling_steps: Of DDIM, for each of these.
        samples: How many images of each class are measured.
        classifier: Directory of a classifier of these images (`headwise train vit` makes one),
            whose features FID and its like compare; None trains a small one first.
        learning_rate: Reached after warmup_steps, then constant.
    """

    sizes: ClassVar[dict[str, str]] = {
        name: f"dit-{name}" for name in ("test", "s", "b", "l", "xl")
    }
    dense_label = "DiT"
    routed_label = "MoH-DiT"

    output: Path = Path("runs/dit")
    vae: str | None = None
    class_dropout: float = 0.1
    averaging: float = 0.9999
    guidance_scale: float = 1.5
    sampling_steps: int = 50
    samples: int = 30
    classifier: Path | None = None
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500

    def __post_init__(self) -> None:
        for name in ("class_dropout", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in 0..1, below 1")
        if self.class_dropout == 0 and self.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale}; with class_dropout 0 it must be 1"
            )
        check_guidance(self.guidance_scale)
        for name in ("sampling_steps", "samples"):
            check_at_least(1, name, getattr(self, name))
        side = self.image_size or 1
        sizes = {"samples": self.samples, "image_size": self.image_size}
        check_memory(4 * self.samples * side**2, "the samples", **sizes)
        super().__post_init__()

    @property
    def final_learning_rate(self) -> float:
        """Constant, as in the paper."""
        return self.learning_rate

    @property
    def recipe(self) -> str:
        return "dit"

    @property
    def title(self) -> str:
        return "Diffusion transformers with all heads and with some"

    def read(self) -> Task:
        # Not above: help on a recipe's fields shall not wait for what reads images.
        from headwise.recipes.dit_task import read_images

        return read_images(self)


def dit() -> DiffusionRun:
    """DiT and MoH-DiT, small ones, that draw handwritten digits or images of your own."""
    return DiffusionRun()
