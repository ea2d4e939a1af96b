"""A comparison's last numbers: each model and seed by each measure."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from headwise.analysis.plots.style import (
    INK,
    MARKERS,
    VARIANTS,
    band,
    cycle,
    mean,
    name_rows,
    styled,
)

Point = tuple[str, float | None, float]


class Panel(NamedTuple):
    """What models came to by one measure.

    Attributes:
        title: What was measured on.
        quantity: What was measured.
        points: (label, position on the axis, value) of each model and seed.
    """

    title: str
    quantity: str
    points: Sequence[Point]


@styled
def comparison(panels: Sequence[Panel], *, axis: str | None) -> Figure:
    """Side by side: against `axis`, what the positions are, if given, else a row a model."""
    rows = len({label for label, _, _ in panels[0].points})
    height = 3.2 if axis else 1.3 + 0.34 * rows
    figure = Figure(figsize=(4.4 * len(panels), height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=axis is None)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_title(panel.title)
        if axis is None:
            _rows(axes, panel)
        else:
            _line(axes, panel, axis)
    return figure


def _rows(axes: Axes, panel: Panel) -> None:
    """A marker a seed, a bar at the mean; the first model on top."""
    by_label: dict[str, list[float]] = {}
    for label, _, value in panel.points:
        by_label.setdefault(label, []).append(value)
    for row, values in enumerate(by_label.values()):
        colour, marker = cycle(VARIANTS, row), cycle(MARKERS, row)
        axes.plot(values, [row] * len(values), marker, color=colour, markersize=7, alpha=0.75)
        axes.vlines(mean(values), row - 0.3, row + 0.3, color=INK, linewidth=1.6)
    name_rows(axes, list(by_label))
    axes.set_ylim(len(by_label) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(f"{panel.quantity}\n(a marker a seed, a bar at the mean)")


def _line(axes: Axes, panel: Panel, axis: str) -> None:
    """Means joined, the band is the range over seeds. Models without a position are levels."""
    by_position: dict[float, list[float]] = {}
    levels: dict[str, list[float]] = {}
    for label, position, value in panel.points:
        if position is None:
            levels.setdefault(label, []).append(value)
        else:
            by_position.setdefault(position, []).append(value)
    at = sorted(by_position)
    for label, values in levels.items():
        axes.axhline(mean(values), color=INK, linewidth=1, linestyle="--", label=label)
        axes.axhspan(min(values), max(values), color=INK, alpha=0.08, linewidth=0)
    columns = [by_position[x] for x in at]
    drawn = band(axes, at, columns, color=VARIANTS[1], marker="o", markersize=4.5)
    drawn.set_label("range over seeds")
    axes.set(xlabel=axis, ylabel=panel.quantity)
    axes.legend()
