"""Which classes and which patches of an image switch a head on."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headwise.analysis.image_records import RoutedImage, from_png
from headwise.analysis.plots.style import INK, new_figure, percent, styled
from headwise.analysis.records import HeadLoads

# More domains than this are drawn as a map; their dots could not be told apart.
MANY_DOMAINS = 8
_MOST_NAMES = 50
_MOST_NUMBERS = 300
_LONGEST_NAME = 24  # letters
# Rows of a patch map in inches, and up to how many heads they may be so high.
_TALL, _LOW, _FEW_HEADS = 0.9, 0.6, 8
# Neither the black or white of drawings nor a colour of many photographs.
_BLUE = (0.56, 0.7, 0.84)


@styled
def head_load_map(heads: HeadLoads, layer: int | None = None) -> Figure:
    """How often each routed head is on for each class: a row a class (domain), a column a head.

    Of few classes the shares are written too; of more than 50 not all are named.

    **Source**: as figure 3 of the MoH paper (arXiv 2410.11842).

    Args:
        heads: Loads by class. `LoadMeter` counts them, also in batches of mixed classes:
            `meter.add(name, [r.with_mask((labels == i)[:, None]) for r in routings.values()])`.
        layer: Its index, -1 for the last. Default: all layers, side by side.

    Raises:
        ValueError: If no head is routed there.
    """
    names = list(heads.by_domain)
    depth = len(heads.shared_heads)
    layers = range(depth) if layer is None else [layer % depth]
    counts = {i: len(heads.routed(names[0], i)) for i in layers}
    rows = [[load for i in layers for load in heads.routed(name, i)] for name in names]
    if not rows[0]:
        raise ValueError("no head is routed; give loads with more heads than shared_heads")
    columns, labels = len(rows[0]), [_short(name, _LONGEST_NAME) for name in names]
    margin = max(2.6, 1.9 + 0.085 * max(map(len, labels)))
    figure, axes = new_figure(
        min(margin + 0.38 * columns, 9 if layer is not None else 12),
        min(1.5 + 0.24 * len(rows), 9.5),
    )
    image = axes.imshow(rows, aspect="auto", interpolation="none", vmin=0, vmax=1)
    if columns * len(rows) <= _MOST_NUMBERS:
        _write_shares(axes, rows)
    drawn = range(0, len(names), math.ceil(len(names) / _MOST_NAMES))
    axes.set_yticks(drawn, [labels[row] for row in drawn])
    axes.grid(visible=False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.set_ylabel("Class")
    if layer is None:
        _name_layers(axes, counts)
    else:
        (index,) = layers
        ticks = range(0, columns, math.ceil(columns / 24))
        axes.set_xticks(ticks, [str(heads.routed_heads(index)[i]) for i in ticks])
        axes.set_title(f"Layer {index}")
        axes.set_xlabel("Routed head (index)")
    figure.colorbar(image, ax=axes, format=percent, label="On for (% of tokens)", pad=0.02)
    return figure


def last_routed_layer(heads: HeadLoads) -> int | None:
    """Index of the last layer that has routed heads; None where no layer has."""
    (first, *_) = heads.by_domain
    routed = [i for i in range(len(heads.shared_heads)) if heads.routed(first, i)]
    return routed[-1] if routed else None


@styled
def patch_maps(images: Sequence[RoutedImage], position: int, heads: HeadLoads) -> Figure:
    """Images side by side, and below them once for each routed head, blue where it is off.

    Args:
        images: Of one model.
        position: Which of their maps.
        heads: Loads of the model, which say which heads are routed.
    """
    layer = images[0].maps[position].layer
    routed = heads.routed_heads(layer)
    side = _TALL if len(routed) <= _FEW_HEADS else _LOW
    rows = [None, *routed]
    figure, axes = new_figure(side * len(images) + 0.8, side * len(rows) + 0.7)
    for column, image in enumerate(images):
        pixels, patches = from_png(image.png), image.maps[position]
        for row, head in enumerate(rows):
            # From left to right, from bottom to top, with a gap to the neighbours.
            where = (column + 0.04, column + 0.96, row + 0.96, row + 0.04)
            most = 255 if pixels.dtype == np.uint8 else 1
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=most, extent=where, interpolation="none")
            if head is not None:
                on = np.array([head in heads_on for heads_on in patches.heads_on])
                _veil(axes, on.reshape(patches.grid), where)
    axes.set(xlim=(0, len(images)), ylim=(len(rows), 0), aspect="equal")
    names = [_short(image.domain, round(12 * side)) for image in images]
    axes.set_xticks(np.arange(len(images)) + 0.5, names)
    axes.set_yticks(np.arange(len(rows)) + 0.5, ["image", *map(str, routed)])
    axes.tick_params(length=0, labelcolor=INK, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set_title(f"Layer {layer}, {' × '.join(map(str, images[0].maps[position].grid))} patches")
    axes.set(xlabel="Class of the image", ylabel="Routed head (index)")
    return figure


def _veil(axes: Axes, on: NDArray, where: tuple[float, float, float, float]) -> None:
    """Blue over the patches that are not on, through which they shine."""
    veil = np.full((*on.shape, 4), (*_BLUE, 0.85))
    veil[on, 3] = 0
    axes.imshow(veil, extent=where, interpolation="none")


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _name_layers(axes: Axes, counts: dict[int, int]) -> None:
    """A gap between the heads of two layers, and each layer's index below its heads."""
    ends = np.cumsum(list(counts.values()))
    axes.vlines(ends[:-1] - 0.5, *axes.get_ylim(), color="white", linewidth=2.5)
    shown = {i: end - (n + 1) / 2 for (i, n), end in zip(counts.items(), ends, strict=True) if n}
    axes.set_xticks(list(shown.values()), list(map(str, shown)))
    axes.set(title="All layers", xlabel="Layer (index), its routed heads from left to right")


def _write_shares(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            # The colours of small shares are dark, in a page's dark scheme too.
            colour = "white" if share < 0.6 else "black"
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", size=7, color=colour)
