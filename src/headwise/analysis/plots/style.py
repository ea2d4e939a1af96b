"""What all figures share. No pyplot, so no global figure and no display.

Colours are Okabe and Ito's, which most colour-blind people can tell apart; markers and line styles
say the same again.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from headwise.analysis.svg import inline_svg

INK, MUTED, GRID = "#1c2025", "#5a636e", "#dde1e6"
VARIANTS = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7")
DOMAINS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7")
MARKERS = "osD^vPX"
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)), ":")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "headwise",
}
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page that holds others; see `svg.inline_svg`.

    Args:
        figure: Drawn by this file; title and axes become the accessible name.
        name: Unlike that of any other figure of the page; all ids begin with it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        # dpi is that of the images in it.
        figure.savefig(buffer, format="svg", transparent=True, dpi=216, metadata={"Date": None})
    axes = figure.axes[0]
    title = f"{axes.get_title('left')}: {axes.get_ylabel()} against {axes.get_xlabel()}"
    svg = inline_svg(buffer.getvalue(), name, title, round(figure.get_figwidth() * 108))
    # The page sets these three anew in a dark scheme; the palette is legible in both.
    for colour, variable in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--line")):
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def legend(axes: Axes) -> None:
    """Below the axes, where there is something to name."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(len(handles), 3)
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2
        )


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)


def band(
    axes: Axes, at: Sequence[float], columns: Sequence[Sequence[float]], *, color: str, **line: Any
) -> Artist:
    """A line through the means of the columns, and their range around it, which is returned."""
    axes.plot(at, [mean(column) for column in columns], color=color, **line)
    lowest, highest = ([end(column) for column in columns] for end in (min, max))
    return axes.fill_between(at, lowest, highest, color=color, alpha=0.18, linewidth=0)


def lines_with_bands(
    axes: Axes, lines: Mapping[str, Mapping[Any, Sequence[float]]], *, markersize: float
) -> list[Artist]:
    """A line for each label, through the means of its columns; their ranges, which are returned."""
    bands = []
    for index, (label, columns) in enumerate(lines.items()):
        at = sorted(columns)
        drawn = band(
            axes,
            at,
            [columns[x] for x in at],
            color=cycle(VARIANTS[1:], index),
            linestyle=cycle(DASHES, index),
            marker=cycle(MARKERS, index),
            markersize=markersize,
            label=label,
        )
        bands.append(drawn)
    return bands


def percent(share: float, _: float = 0) -> str:
    return f"{100 * share:.4g}"


def cycle(choices: Sequence, index: int) -> Any:
    return choices[index % len(choices)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
