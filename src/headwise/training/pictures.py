"""Small pictures for a run's page: which heads see which patches, and what a model draws."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from headwise.analysis.image_records import PatchMap, RoutedImage, SampleGrid, to_png
from headwise.analysis.measure import heads_on
from headwise.data.images import ImageSet
from headwise.data.sampling import spread
from headwise.hf import record_routing
from headwise.ops import HeadRouting

# So many images and no larger ones, in pixels, so that a page stays small.
_IMAGES, _IMAGE_SIDE, _SAMPLE_SIDE = 6, 96, 64
_GAP = 2  # pixels between the images of a grid


@torch.no_grad()
def routed_images(
    model: Any, images: ImageSet, labels: NDArray[np.int64], see: Callable[[list[int]], Any]
) -> list[RoutedImage]:
    """Images of a few classes, and the heads that are on for each of their patches.

    There is a map of the last layer with routed heads for each size of patches.

    Args:
        model: Of square images. One without routed heads gives no images.
        images: Of these the first one of a class is taken.
        labels: Their classes.
        see: Lets the model see the images of these indices.
    """
    classes = np.unique(labels)
    few = classes[spread(len(classes), _IMAGES)]
    picks = [int((labels == label).argmax()) for label in few]
    with record_routing(model) as routings:
        see(picks)
    of_heads = [routing for routing in routings.values() if isinstance(routing, HeadRouting)]
    last = {}
    for layer, routing in enumerate(of_heads):
        if routing.probabilities.shape[-1]:
            last[routing.weights.shape[1]] = (layer, routing)
    if not last:
        return []
    return [
        RoutedImage(
            domain=images.classes[labels[pick]],
            png=to_png(_image(images.pixels[pick], _IMAGE_SIDE)),
            maps=[_patch_map(layer, routing, i) for layer, routing in last.values()],
        )
        for i, pick in enumerate(picks)
    ]


def sample_grid(images: NDArray[np.uint8], rows: Sequence[str]) -> SampleGrid:
    """Images [N, C, S, S] of some classes, equally many of each, one class after another."""
    side = images.shape[-1]
    if side > _SAMPLE_SIDE:
        small = [np.asarray(_image(x, _SAMPLE_SIDE)) for x in images]
        images = np.stack([x[None] if x.ndim == 2 else np.moveaxis(x, -1, 0) for x in small])
    scale = max(1, _SAMPLE_SIDE // side)
    grid = in_grid(images, columns=len(images) // len(rows), scale=scale)
    return SampleGrid(list(rows), to_png(grid))


def in_grid(images: NDArray[np.uint8], *, columns: int, scale: int) -> Image.Image:
    """Images [N, C, S, S] row by row on white, each pixel `scale` pixels wide."""
    large = images.repeat(scale, axis=2).repeat(scale, axis=3)
    padding = ((0, 0), (0, 0), (_GAP, _GAP), (_GAP, _GAP))
    framed = np.pad(large, padding, constant_values=255)
    together = rearrange(framed, "(r c) k h w -> (r h) (c w) k", c=columns)
    return Image.fromarray(together[..., 0] if images.shape[1] == 1 else together)


def _patch_map(layer: int, routing: HeadRouting, image: int) -> PatchMap:
    on = heads_on(routing.with_weights(routing.weights[image]))
    side = math.isqrt(len(on))
    return PatchMap(layer, [side, side], on)


def _image(pixels: NDArray[np.uint8], most: int) -> Image.Image:
    """[C, S, S] as an image, made smaller where its side is above `most`."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else rearrange(pixels, "c h w -> h w c"))
    image.thumbnail((most, most))
    return image
