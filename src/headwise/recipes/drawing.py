"""Drawing with a diffusion transformer: diffusers' schedulers, our pipeline, images in parts."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from headwise.models import DiT
from headwise.progress import followed

SchedulerName = Literal["ddim", "ddpm", "dpm"]
_AT_A_TIME = 100  # images


def check_steps(field: str, steps: int) -> None:
    """Raises ValueError if schedulers have fewer steps than that."""
    if steps > (most := len(schedule().betas)):
        raise ValueError(f"{field} is {steps}; it must be at most {most}")


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


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "drawing images needs diffusers, which is not installed; the extra diffusion has it: "
            "`pip install 'headwise[diffusion]'`"
        ) from None
    return diffusers
