"""What a model loses with heads, as a figure."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from headwise.analysis.plots.style import (
    INK,
    legend,
    lines_with_bands,
    new_figure,
    percent,
    styled,
)

_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
_HIGHEST = 3.0


@styled
def quality_against_share(
    lines: Mapping[str, Mapping[float, Sequence[float]]], *, title: str
) -> Figure:
    """Perplexity over the original's against the share of heads on, a line for each conversion.

    Args:
        lines: By label and share of heads, perplexity over the original's, of each seed; the line
            goes through the means, the band is their range. What loses more than 200 % is above
            the figure.
        title: Of the figure.
    """
    figure, axes = new_figure(6.2, 4.2)
    axes.axhline(1, color=INK, linewidth=1)
    lowest = min([1.0, *(x for line in lines.values() for found in line.values() for x in found)])
    lines_with_bands(axes, lines, markersize=5)
    axes.set_yscale("log")
    axes.set_ylim(0.97 * lowest, _HIGHEST)
    axes.set_yticks([tick for tick in _TICKS if tick >= 0.97 * lowest])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_change))
    axes.xaxis.set_major_formatter(FuncFormatter(percent))
    axes.set(title=title, xlabel="Heads on (% of all, mean over layers)")
    axes.set_ylabel("Perplexity against the original's")
    legend(axes)
    return figure


def _change(ratio: float, _: float) -> str:
    return "0 %" if ratio == 1 else f"{100 * (ratio - 1):+.0f} %"
