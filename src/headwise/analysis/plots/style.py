"""What all figures share. No pyplot, so no global figure and no display.

Colours are Okabe and Ito's, which most colour-blind people can tell apart; markers and line styles
say the same again.
"""

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
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


def legend(axes: Axes, *, outside: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    if not outside:
        axes.legend(handles, labels, loc="upper right")
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(handles), 3), columnspacing=1.2
    )


def percent(share: float, _: float = 0) -> str:
    return f"{100 * share:.4g}"


def cycle(choices: Sequence, index: int) -> Any:
    return choices[index % len(choices)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
