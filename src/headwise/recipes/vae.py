"""diffusers' AutoencoderKL: loaded, checked against a run's images, which it brings to latents."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headwise.data.images import ImageSet
from headwise.data.patches import in_floats
from headwise.hf.loading import check_holds_model, check_place

_AT_A_TIME = 64


def load_vae(path: str) -> Any:
    """diffusers' AutoencoderKL of that directory or name, in eval mode.

    Raises:
        ValueError: If there is none, or a weight is missing or misshapen.
    """
    from diffusers import AutoencoderKL

    try:
        check_holds_model(path)
        check_place(path)
        kind = AutoencoderKL.load_config(path).get("_class_name")
        if kind != AutoencoderKL.__name__:
            raise ValueError(f"it is of class {kind!r}")
        vae, info = AutoencoderKL.from_pretrained(
            path, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it has no weight {missing[0]}")
    except Exception as error:  # a path can be wrong in as many ways as there are models
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"vae {path} holds no AutoencoderKL: {reason}") from error
    return vae.eval()


def images_for(vae: Any, path: str, images: ImageSet) -> ImageSet:
    """The images, grey ones in the three channels of a VAE that takes colour.

    Raises:
        ValueError: If the VAE takes other channels, or would not give back images of that size.
    """
    takes, factor = vae.config.in_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    _, channels, size, _ = images.pixels.shape
    if channels not in (1, takes):
        raise ValueError(f"vae {path} takes {takes} channels; the images have {channels}")
    if size % factor:
        raise ValueError(
            f"the images have side {size}; vae {path} takes multiples of {factor}, so give such an "
            "image_size"
        )
    return replace(images, pixels=images.pixels.repeat(takes // channels, axis=1))


@torch.no_grad()
def encoded(vae: Any, images: ImageSet) -> NDArray[np.float32]:
    """What a model learns to draw: pixels in -1..1, or with a VAE the means of their latents."""
    if vae is None:
        return in_floats(images.pixels).numpy()
    parts = []
    for start in range(0, len(images), _AT_A_TIME):
        pixels = in_floats(images.pixels[start : start + _AT_A_TIME])
        parts.append(vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor)
    return torch.cat(parts).float().numpy()
