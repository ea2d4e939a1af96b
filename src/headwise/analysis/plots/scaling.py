"""Cost as work grows, as a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from headwise.analysis.plots.style import (
    DASHES,
    INK,
    MARKERS,
    MUTED,
    VARIANTS,
    cycle,
    legend,
    styled,
)

Row = Mapping[str, Any]

# What is drawn of time and of memory: the column, whose it is, its colour and marker.
_LINES = {
    "time (ms)": ("ours_ms", "rival_ms", "limit_ms"),
    "memory (MiB)": ("ours_mib", "rival_mib", "kept_mib"),
}
_OWNERS = (("ours", VARIANTS[1], 0), ("rival", INK, 1), ("least", MUTED, 2))


@styled
def cost_against_size(rows: Sequence[Row]) -> Figure:
    """Time and memory against the size that grows, both on logarithmic axes.

    A line of panels for each series; ours, the rival's and the least, a dash for each dtype.
    """
    series: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        series.setdefault((row["case"], row["axis"], row["rival"]), []).append(row)
    figure = Figure(figsize=(8.8, 0.6 + 2.7 * len(series)), layout="constrained")
    panels = figure.subplots(len(series), len(_LINES), squeeze=False)
    for line, ((case, axis, rival), members) in zip(panels, series.items(), strict=True):
        for axes, (quantity, names) in zip(line, _LINES.items(), strict=True):
            _draw(axes, members, names)
            axes.set(xlabel=axis, ylabel=quantity)
        line[0].set_title(f"{case}, beside {rival}")
    legend(panels[0][0])
    return figure


def _draw(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    drawn = 0
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for dash, dtype in enumerate(dtypes):
        for name, (owner, colour, marker) in zip(names, _OWNERS, strict=True):
            points = sorted(
                (int(row["size"]), float(row[name]))
                for row in rows
                if row["dtype"] == dtype and row[name] not in (None, "") and float(row[name]) > 0
            )
            drawn += len(points)
            axes.plot(
                [size for size, _ in points],
                [value for _, value in points],
                color=colour,
                linestyle=cycle(DASHES, dash),
                marker=cycle(MARKERS, marker),
                markersize=3.5,
                label=f"{owner}, {dtype}",
            )
    sizes = sorted({int(row["size"]) for row in rows})
    axes.set_xscale("log", base=2)
    if drawn:  # of nothing there is no logarithm
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _short(size)))
    axes.xaxis.set_minor_locator(NullLocator())


def _short(size: float) -> str:
    """Such as 512, 1k, 128k."""
    whole = round(size)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole}"
