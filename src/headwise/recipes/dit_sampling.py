"""Drawing images with a trained DiT: schedulers, VAE, a grid of what was drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from headwise.data.images import ImageSet
from headwise.data.patches import in_floats
from headwise.models import DiT
from headwise.ops.choice import check_choice
from headwise.recipes.arguments import check_at_least
from headwise.recipes.directory import write_whole
from headwise.recipes.loading import check_holds_model

SchedulerName = Literal["ddim", "ddpm", "dpm"]
_AT_A_TIME = 64
_GAP = 2  # pixels between the images of a grid


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """Draw images of classes with a DiT: a grid with a row a class.

    Attributes:
        directory: Of the model, for example runs/dit/models/moh_75-seed0.
        output: The PNG file to write.
        classes: Which classes, by number; all of them if empty.
        per_class: Images of each.
        guidance_scale: 1 is no guidance.
        steps: Of the scheduler.
        scheduler: ddim, ddpm or dpm (DPM-Solver++).
        seed: Of the first image; the others count on from it.
        vae: Directory or name of the AutoencoderKL that the model was trained with.
        scale: How many pixels of the grid a pixel of an image becomes.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    classes: tuple[int, ...] = ()
    per_class: int = 8
    guidance_scale: float = 2.0
    steps: int = 50
    scheduler: SchedulerName = "ddim"
    seed: int = 0
    vae: str | None = None
    scale: int = 4

    def __post_init__(self) -> None:
        check_choice("scheduler", self.scheduler, SchedulerName)
        for name in ("per_class", "steps", "scale"):
            check_at_least(1, name, getattr(self, name))
        if self.output.suffix != ".png":
            raise ValueError(f"output is {self.output}; it must be the name of a .png file")


def sample(run: SampleRun) -> None:
    """Draw the grid, written beside and renamed.

    Raises:
        ValueError: If there is no DiT in the directory, or a class is out of range.
    """
    model = load_dit(run.directory)
    vae = None if run.vae is None else load_vae(run.vae)
    classes = run.classes or tuple(range(model.config.num_labels))
    pipeline = pipeline_of(model, run.scheduler, vae)
    wanted = [label for label in classes for _ in range(run.per_class)]
    images = pipeline(
        wanted,
        guidance_scale=run.guidance_scale,
        num_inference_steps=run.steps,
        seeds=range(run.seed, run.seed + len(wanted)),
        output_type="pt",
    ).images
    grid = in_grid(uint8(images), columns=run.per_class, scale=run.scale)
    write_whole(run.output, lambda partial: grid.save(partial, format="PNG"))
    print(run.output)


def load_dit(directory: Path) -> DiT:
    """The model in a directory, in eval mode.

    Raises:
        ValueError: If there is none.
    """
    check_holds_model(directory)
    try:
        return DiT.from_pretrained(directory).eval()
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{directory} holds no DiT that can be loaded: {reason}") from error


def load_vae(path: str) -> Any:
    """diffusers' AutoencoderKL of that directory or name, in eval mode.

    Raises:
        ValueError: If there is none.
    """
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(path).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"vae {path} holds no AutoencoderKL: {reason}") from error


@torch.no_grad()
def encoded(vae: Any, images: ImageSet) -> NDArray[np.float32]:
    """What a model learns to draw: pixels in -1..1, or with a VAE the means of their latents."""
    if vae is None:
        return in_floats(images.pixels).numpy()
    parts = []
    for start in range(0, len(images), _AT_A_TIME):
        pixels = in_floats(images.pixels[start : start + _AT_A_TIME])
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        parts.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(parts).float().numpy()


def schedule() -> Any:
    """DiT's 1000 linear steps: what makes images noisy in training."""
    return _diffusers().DDPMScheduler()


def pipeline_of(model: DiT, scheduler: SchedulerName, vae: Any) -> Any:
    """The pipeline that draws with a model."""
    diffusers = _diffusers()
    from headwise.models.dit_pipeline import RoutedDiTPipeline

    learned = {"variance_type": "learned_range"} if model.config.learn_sigma else {}
    kinds = {
        "ddim": (diffusers.DDIMScheduler, {}),
        "ddpm": (diffusers.DDPMScheduler, learned),
        "dpm": (diffusers.DPMSolverMultistepScheduler, {}),
    }
    kind, options = kinds[scheduler]
    # Of what is drawn, pixels lie in -1..1; latents anywhere.
    clip = {"thresholding" if scheduler == "dpm" else "clip_sample": vae is None}
    return RoutedDiTPipeline(model, kind(**options, **clip), vae)


def uint8(images: Tensor) -> NDArray[np.uint8]:
    """0..1 to 0..255."""
    return (255 * images.clamp(0, 1)).round().to(torch.uint8).cpu().numpy()


def in_grid(images: NDArray[np.uint8], *, columns: int, scale: int) -> Image.Image:
    """Images [N, C, S, S] row by row on white, each pixel `scale` pixels wide."""
    large = images.repeat(scale, axis=2).repeat(scale, axis=3)
    padding = ((0, 0), (0, 0), (_GAP, _GAP), (_GAP, _GAP))
    framed = np.pad(large, padding, constant_values=255)
    together = rearrange(framed, "(r c) k h w -> (r h) (c w) k", c=columns)
    return Image.fromarray(together[..., 0] if images.shape[1] == 1 else together)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "drawing images needs diffusers, which is not installed; in the checkout of headwise "
            "`pip install -c constraints.txt '.[diffusion]'`"
        ) from None
    return diffusers
