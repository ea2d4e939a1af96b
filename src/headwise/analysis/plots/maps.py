"""Which classes and which patches of an image switch a head on."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from headwise.analysis.plots.style import INK, mean, new_figure, percent, styled
from headwise.analysis.records import HeadLoads

# More domains than this are drawn as a map; their dots could not be told apart.
MANY_DOMAINS = 8
_MOST_NAMES = 50
_MOST_NUMBERS = 300
_COLUMNS = 6


@styled
def head_load_map(heads: HeadLoads, layer: int | None = None) -> Figure:
    """How often each routed head is on for each class: a row a class (domain), a column a head.

    Of few classes the shares are written too; of more than 50 not all are named.

    **Source**: as figure 3 of the MoH paper (arXiv 2410.11842).

    Args:
        heads: Loads by class. `LoadMeter` counts them, also in batches of mixed classes:
            `meter.add(name, [r.with_mask((labels == i)[:, None]) for r in routings.values()])`.
        layer: Its index, -1 for the last. Default: the mean over all layers.

    Raises:
        ValueError: If the mean is asked of layers that differ in heads, or no head is routed.
    """
    if layer is None and not same_heads(heads):
        raise ValueError("layer is None, but the layers differ in heads; name one")
    rows = [_routed(heads, domain, layer) for domain in heads.by_domain]
    if not rows or not rows[0]:
        raise ValueError("no head is routed; give loads with more heads than shared_heads")
    figure, axes = new_figure(min(2.6 + 0.38 * len(rows[0]), 9), min(1.5 + 0.24 * len(rows), 9.5))
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    if len(rows) * len(rows[0]) <= _MOST_NUMBERS:
        _write_shares(axes, rows)
    names = list(heads.by_domain)
    drawn = range(0, len(names), math.ceil(len(names) / _MOST_NAMES))
    axes.set_yticks(drawn, [names[row] for row in drawn])
    step = math.ceil(len(rows[0]) / 24)
    columns = range(0, len(rows[0]), step)
    first = heads.shared_heads[-1 if layer is None else layer]
    axes.set_xticks(columns, [str(first + column) for column in columns])
    axes.grid(visible=False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.set_title("All layers" if layer is None else f"Layer {layer % _num_layers(heads)}")
    axes.set_xlabel("Routed head (index)")
    axes.set_ylabel("Class")
    figure.colorbar(image, ax=axes, format=percent, label="On for (% of tokens)", pad=0.02)
    return figure


def same_heads(heads: HeadLoads) -> bool:
    """Whether all layers have and share as many heads, so that there is a mean over the layers."""
    counts = {len(layer) for layers in heads.by_domain.values() for layer in layers}
    return len(counts) == 1 == len(set(heads.shared_heads))


@styled
def patch_map(
    image: NDArray, weights: Tensor, grid: tuple[int, int], *, shared_heads: int = 0
) -> Figure:
    """The image once for each routed head, pale where the head is off.

    Args:
        image: [H, W, 3] or [H, W, 1], uint8, or floating point in 0..1.
        weights: [T, H], the gates of one layer for the image's tokens: of a `Routing`,
            `weights[i]`. Tokens that are no patches (a class token) are left out.
        grid: Patches from top to bottom and from left to right; T is their product.
        shared_heads: Heads that are always on, which come first and are not drawn.

    Raises:
        ValueError: If the image or the weights have not that shape, the image is out of range, or
            shared_heads leaves no head.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"image is {list(image.shape)}; it must be [H, W, 3] or [H, W, 1]")
    if image.dtype != np.uint8 and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"image is {image.dtype} in {image.min()}..{image.max()}; give uint8, or values in 0..1"
        )
    if weights.ndim != 2 or len(weights) != math.prod(grid):
        raise ValueError(
            f"weights are {list(weights.shape)}; they must be [T, H] with T = {grid[0]}·{grid[1]} "
            "patches, without other tokens"
        )
    routed = range(shared_heads, weights.shape[1])
    if not routed:
        raise ValueError(f"shared_heads is {shared_heads}; it must be less than {weights.shape[1]}")
    height, width = image.shape[:2]
    on = (weights.detach().cpu() != 0).numpy().reshape(*grid, -1)
    lines, columns = math.ceil(len(routed) / _COLUMNS), min(len(routed), _COLUMNS)
    figure = Figure(figsize=(1.5 * columns, (1.5 * height / width + 0.25) * lines + 0.1))
    figure.set_layout_engine("constrained")
    for position, head in enumerate(routed):
        axes = figure.add_subplot(lines, columns, position + 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=255 if image.dtype == np.uint8 else 1)
        veil = np.ones((*grid, 4))
        veil[..., 3] = 0.85 * ~on[..., head]
        axes.imshow(veil, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="nearest")
        axes.set_title(f"Head {head}: {on[..., head].mean():.0%}", fontsize=9)
        axes.set_axis_off()
    return figure


def _routed(heads: HeadLoads, domain: str, layer: int | None) -> list[float]:
    if layer is not None:
        return heads.routed(domain, layer)
    layers = [heads.routed(domain, index) for index in range(_num_layers(heads))]
    return [mean(loads) for loads in zip(*layers, strict=True)]


def _num_layers(heads: HeadLoads) -> int:
    return len(next(iter(heads.by_domain.values())))


def _write_shares(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            # The colours of small shares are dark, in a page's dark scheme too.
            colour = "white" if share < 0.6 else "black"
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", size=7, color=colour)
