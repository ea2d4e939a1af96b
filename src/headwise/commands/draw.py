"""`headwise draw`: images of classes, drawn by a trained DiT, as a grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from headwise.loading import load_config
from headwise.memory import check_memory
from headwise.models import DiT
from headwise.ops.choice import check_choice, look_up
from headwise.parsing import parsed
from headwise.recipes.drawing import SchedulerName, check_steps, draw_images, pipeline_of
from headwise.recipes.vae import load_vae
from headwise.results.files import check_new, write_whole
from headwise.training.directory import check_parents
from headwise.training.fields import check_at_least, check_guidance, check_seed
from headwise.training.pictures import in_grid


def main(argv: list[str]) -> None:
    """Run the command."""
    draw(parsed(DrawingRun, argv, "headwise draw"))


@dataclass(frozen=True, kw_only=True)
class DrawingRun:
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
        check_new("output", self.output)
        check_parents(self.output)


def draw(run: DrawingRun) -> None:
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


def load_dit(directory: Path) -> DiT:
    """The model in a directory, in eval mode.

    Raises:
        ValueError: If there is none.
    """
    load_config(directory, "DiT")
    return DiT.from_pretrained(directory).eval()
