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
    cycle,
    lines_with_bands,
    mean,
    name_rows,
    styled,
)

_IN_A_LINE = 4  # panels


class Point(NamedTuple):
    """What one model and seed came to.

    Attributes:
        label: The model's.
        position: Where it stands on the axis; None for a level beside the others.
        value: Of the measure.
        series: The line that it is a point of; empty where there is one line only.
    """

    label: str
    position: float | None
    value: float
    series: str = ""


class Panel(NamedTuple):
    """What models came to by one measure.

    Attributes:
        title: What was measured on.
        quantity: What was measured.
        points: One of each model and seed.
    """

    title: str
    quantity: str
    points: Sequence[Point]


@styled
def comparison(panels: Sequence[Panel], *, axis: str | None) -> Figure:
    """Side by side, four in a line: against `axis`, what the positions are, else a row a model."""
    rows = len({point.label for point in panels[0].points})
    height = 3.2 if axis else 1.3 + 0.34 * rows
    across = min(len(panels), _IN_A_LINE)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(4.4 * across, height * down), layout="constrained")
    all_axes = figure.subplots(down, across, squeeze=False, sharey=axis is None).flat
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, panel in zip(all_axes, panels, strict=False):
        axes.set_title(panel.title)
        if axis is None:
            _rows(axes, panel)
        else:
            _line(axes, panel, axis)
    return figure


def _rows(axes: Axes, panel: Panel) -> None:
    """A marker a seed, a bar at the mean; the first model on top."""
    by_label: dict[str, list[float]] = {}
    for point in panel.points:
        by_label.setdefault(point.label, []).append(point.value)
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
    """Means of each series joined, its range over seeds; models without a position are levels."""
    lines: dict[str, dict[float, list[float]]] = {}
    levels: dict[str, list[float]] = {}
    for label, position, value, series in panel.points:
        if position is None:
            levels.setdefault(label, []).append(value)
        else:
            lines.setdefault(series, {}).setdefault(position, []).append(value)
    for label, values in levels.items():
        axes.axhline(mean(values), color=INK, linewidth=1, linestyle="--", label=label)
        axes.axhspan(min(values), max(values), color=INK, alpha=0.08, linewidth=0)
    for drawn in lines_with_bands(axes, lines, markersize=4.5)[-1:]:
        drawn.set_label("range over seeds")
    axes.set(xlabel=axis, ylabel=panel.quantity)
    axes.legend()
