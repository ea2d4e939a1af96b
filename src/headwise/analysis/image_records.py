"""What a comparison of image models shows beside numbers: small pictures, as plain data."""

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class PatchMap:
    """The heads that are on for the patches of an image, in one layer.

    Attributes:
        layer: Its index, as in the loads.
        grid: Patches from top to bottom and from left to right.
        heads_on: [patch], row by row, a list of the heads that are on, shared ones included.
    """

    layer: int
    grid: list[int]
    heads_on: list[list[int]]

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or math.prod(self.grid) != len(self.heads_on):
            raise ValueError(f"grid is {self.grid}; heads_on has {len(self.heads_on)} patches")


@dataclass(frozen=True)
class RoutedImage:
    """An image and the heads that were on while the model saw it.

    Attributes:
        domain: Its class, as in the loads.
        png: The image, a PNG file in base64.
        maps: Of some layers, the same for all images of a model.
    """

    domain: str
    png: str
    maps: list[PatchMap]


@dataclass(frozen=True)
class SampleGrid:
    """Images that a model drew, a row a class.

    Attributes:
        rows: Names of the classes.
        png: The grid, a PNG file in base64.
    """

    rows: list[str]
    png: str


def to_png(image: Image.Image) -> str:
    """A PNG file in base64."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def from_png(text: str) -> NDArray[np.uint8]:
    """The pixels of a PNG file in base64, [H, W] grey or [H, W, 3]."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)
