"""Drawing images with a trained DiT: schedulers, VAE, a grid of what was drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from headwise.files import write_whole
from headwise.memory import check_memory
from headwise.models import DiT
from headwise.ops.choice import check_choice, look_up
from headwise.progress import followed
from headwise.recipes.arguments import check_at_least, check_guidance, check_seed
from headwise.recipes.directory import check_parents
from headwise.recipes.loading import load_config
from headwise.recipes.vae import load_vae

SchedulerName = Literal["ddim", "ddpm", "dpm"]
_AT_A_TIME = 100  # images
_GAP = 2  # pixels between the images of a grid


@dataclass(frozen=True, kw_only=True)
class SampleRun:
    """Draw images of classes with a DiT: a grid with a row a class.

    Attributes:
        directory: Of the model, for example runs/dit/models/moh_75-seed0.
        output: The PNG file to write; must not be there yet.
        classes: Which classes, by name or number; all of them if empty.
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
    classes: tuple[int | str, ...] = ()
    per_class: int = 8
    guidance_scale: float = 2.0
    steps: int = 50
    scheduler: SchedulerName = "ddim"
    seed: int = 0
    vae: str | None = None
    scale: int = 4

    def __post_init__(self) -> None:
        check_choice("scheduler", self.scheduler, SchedulerName)
        check_guidance(self.guidance_scale)
        for name in ("per_class", "steps", "scale"):
            check_at_least(1, name, getattr(self, name))
        check_seed("seed", self.seed)
        grid = self.per_class * self.scale**2
        check_memory(grid, "the grid", per_class=self.per_class, scale=self.scale)
        if self.output.suffix != ".png":
            raise ValueError(f"output is {self.output}; it must be the name of a .png file")
        if self.output.exists():
            raise ValueError(f"output is {self.output}, which exists; choose another")
        check_parents(self.output)


def sample(run: SampleRun) -> None:
    """Draw the grid, written beside and renamed.

    Raises:
        ValueError: If there is no DiT in the directory, it has no such class, or it does not suit
            the VAE, the guidance or the steps.
    """
    check_steps("steps", run.steps)
    model = load_dit(run.directory)
    channels = model.config.in_channels
    if run.vae is None and channels not in (1, 3):
        raise ValueError(
            f"vae is None, and the model in {run.directory} draws {channels} channels, which are "
            "no image; give the vae that it was trained with"
        )
    vae = None if run.vae is None else load_vae(run.vae)
    classes = [number_of(x, model) for x in run.classes] or range(model.config.num_labels)
    pipeline = pipeline_of(model, run.scheduler, vae)
    wanted = [label for label in classes for _ in range(run.per_class)]
    parts = draw_images(pipeline, wanted, run.seed, run.guidance_scale, run.steps)
    grid = in_grid(np.concatenate(list(parts)), columns=run.per_class, scale=run.scale)
    write_whole(run.output, lambda partial: grid.save(partial, format="PNG"))
    print(run.output)


def number_of(label: int | str, model: DiT) -> int:
    """A class of the model, given by number or by name.

    Raises:
        ValueError: If there is no such class, with the nearest name.
    """
    config = model.config
    if isinstance(label, str):
        return look_up("class", label, {name: i for i, name in config.id2label.items()})
    if not 0 <= label < config.num_labels:
        raise ValueError(
            f"classes holds {label}; the model knows 0..{config.num_labels - 1} ("
            f"{config.id2label[0]} to {config.id2label[config.num_labels - 1]})"
        )
    return label


def check_steps(field: str, steps: int) -> None:
    """Raises ValueError if schedulers have fewer steps than that."""
    if steps > (most := len(schedule().betas)):
        raise ValueError(f"{field} is {steps}; it must be at most {most}")


def load_dit(directory: Path) -> DiT:
    """The model in a directory, in eval mode.

    Raises:
        ValueError: If there is none.
    """
    load_config(directory, "DiT")
    return DiT.from_pretrained(directory).eval()


def schedule() -> Any:
    """DiT's 1000 linear steps: what makes images noisy in training."""
    return _diffusers().DDPMScheduler()


def pipeline_of(model: DiT, scheduler: SchedulerName, vae: Any) -> Any:
    """The pipeline that draws with a model."""
    diffusers = _diffusers()
    from headwise.models.dit.pipeline import RoutedDiTPipeline

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


def draw_images(
    pipeline: Any, classes: Sequence[int], seed: int, guidance_scale: float, steps: int
) -> Iterator[NDArray[np.uint8]]:
    """Images [N, C, S, S] of the classes in 0..255, in parts that fit into memory.

    `seed` is that of the first image; the others count on from it.
    """
    starts = range(0, len(classes), _AT_A_TIME)
    for start in followed(starts, "drawing images", total=len(starts)):
        part = classes[start : start + _AT_A_TIME]
        images = pipeline(
            part,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            seeds=range(seed + start, seed + start + len(part)),
            output_type="pt",
        ).images
        yield (255 * images.clamp(0, 1)).round().to(torch.uint8).cpu().numpy()


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
            "drawing images needs diffusers, which is not installed; the extra diffusion has it: "
            "`pip install 'headwise[diffusion]'`"
        ) from None
    return diffusers
