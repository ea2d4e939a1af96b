"""What the page is put together from; all text in it is escaped."""

from collections.abc import Iterable, Sequence
from typing import Any

from headwise.analysis import plots
from headwise.analysis.records import ModelRecord
from headwise.results.html import escaped


def section(title: str, intro: str, body: str) -> str:
    """A part of the page with its heading; title, intro and body are HTML."""
    paragraph = f'<p class="intro">{intro}</p>' if intro else ""
    return f"<section><h2>{title}</h2>{paragraph}{body}</section>"


def model_heading(model: ModelRecord) -> str:
    """Which model the charts below it are of."""
    return f"<h3>{escaped(model.label)} <small>seed {model.seed}</small></h3>"


def charts(figures: Iterable[tuple[str, Any]], layout: str) -> str:
    """Figures, each with a name that no other of the page has, as the style sheet lays them out."""
    drawn = (f"<figure>{plots.to_svg(figure, name)}</figure>" for name, figure in figures)
    return f'<div class="charts {layout}">{"".join(drawn)}</div>'


def sentences(notes: Sequence[str]) -> str:
    """A list of sentences."""
    items = "".join(f"<li>{escaped(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if items else ""
