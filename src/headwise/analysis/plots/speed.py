"""Speed as a figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headwise.analysis.plots.style import INK, MARKERS, MUTED, VARIANTS, cycle, styled

_CORES = ("core, causal", "core, full")


@styled
def time_against_share(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Time of the attention core against the share of heads on, relative to all heads by SDPA.

    A panel for causal and full, and for each dtype; a line for each length; dotted the ideal.
    """
    rows = [
        r
        for r in rows
        if r["rival"].startswith("SDPA") and r["case"] in _CORES and "kv" not in r["shape"]
    ]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(4.4 * len(_CORES), 3.3 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(_CORES), squeeze=False, sharex=True, sharey=True)
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, case in zip(line, _CORES, strict=True):
            drawn = [r for r in rows if (r["dtype"], r["case"]) == (dtype, case) and r["ratio"]]
            _shares(axes, drawn)
            axes.set_title(f"{case.removeprefix('core, ')}, {dtype}")
    highest = max([1.0, *(float(row["ratio"]) for row in rows if row["ratio"])])
    panels[0][0].set_ylim(0, 1.1 * highest)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    figure.supxlabel("share of heads that are on", color=MUTED, fontsize=10)
    figure.supylabel("time / dense attention's", color=MUTED, fontsize=10)
    return figure


def _shares(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1, label="ideal")
    axes.axhline(1, color=INK, linewidth=1, label="dense, and heads masked")
    for index, shape in enumerate(dict.fromkeys(row["shape"] for row in rows)):
        points = sorted((float(r["share"]), float(r["ratio"])) for r in rows if r["shape"] == shape)
        axes.plot(
            *zip(*points, strict=True),
            color=cycle(VARIANTS[1:], index),
            marker=cycle(MARKERS, index),
            markersize=4,
            label=shape,
        )
    axes.set_xlim(0, 1.04)
