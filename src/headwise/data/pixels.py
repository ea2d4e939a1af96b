"""Images of any mode and size as one array of pixels."""

from collections.abc import Iterable

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageOps


def stacked(images: Iterable[tuple[str, Image.Image]], size: int | None) -> NDArray[np.uint8]:
    """All images, each given with what to call it in an error, as one array [N, C, size, size].

    C is 1 where all are grey, else 3. With a size, the middle squares are brought to it.

    Raises:
        ValueError: If an image has not the first one's size, or more than 8 bits.
    """
    prepared: list[Image.Image] = []
    for where, image in images:
        prepared.append(_in_8_bits(where, image))
        if size is not None:
            prepared[-1] = ImageOps.fit(prepared[-1], (size, size), Image.Resampling.BICUBIC)
        side = prepared[0].width
        if image.size != (side, side) and size is None:
            raise ValueError(
                f"{where} has {image.width}×{image.height} pixels; all must be squares as wide as "
                f"the first image, {side}×{side}; image_size (--image-size) makes them so"
            )
    if not prepared:
        return np.zeros((0, 1, 1, 1), dtype=np.uint8)
    mode = "L" if all(image.mode == "L" for image in prepared) else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode)) for image in prepared])
    return arrays[:, None] if mode == "L" else rearrange(arrays, "n h w c -> n c h w")


def _in_8_bits(where: str, image: Image.Image) -> Image.Image:
    """Grey or RGB, on white where it is transparent."""
    if image.mode[0] in "IF":
        raise ValueError(f"{where} has pixels of mode {image.mode!r}; convert it to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
