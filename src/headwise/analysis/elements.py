"""What the page is put together from; all text in it is escaped."""

import re
from collections.abc import Collection, Sequence
from html import escape


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
