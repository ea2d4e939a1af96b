"""What the page is put together from; all text in it is escaped."""

import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Any

from headwise.analysis import plots
from headwise.analysis.records import ModelRecord


def escaped(plain: str) -> str:
    """Text as HTML."""
    return escape(printable(plain))


def printable(plain: str) -> str:
    """Control characters other than tab and line feed as their pictures (␀, ␛)."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else "␡" if c == "\x7f" else c
        for c in plain
    )


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


def table(
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    strong: Collection[tuple[int, int]] = (),
) -> str:
    """A table whose first column names the rows; the cells (row, column) in `strong` are bold."""
    # An arrow stays on the line of the word before it.
    heads = [re.sub(r"\s+([↓↑])$", "\N{NO-BREAK SPACE}\\1", column) for column in columns]
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in heads)
    body = []
    for r, row in enumerate(rows):
        cells = [f'<th scope="row">{escaped(row[0])}</th>'] if row else []
        for c, cell in enumerate(row[1:], start=1):
            bold = (r, c) in strong
            cells.append(f"<td>{'<strong>' * bold}{escaped(cell)}{'</strong>' * bold}</td>")
        body.append("<tr>" + "".join(cells) + "</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(name)}, scrolls '
        f'sideways"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        "</div>"
    )
