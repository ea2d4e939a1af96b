"""Text and tables as HTML; all text is escaped."""

import re
from html import escape

from headwise.results.table import Table


def escaped(plain: str) -> str:
    """Text as HTML."""
    return escape(printable(plain))


def printable(plain: str) -> str:
    """Control characters other than tab and line feed as their pictures (␀, ␛)."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\t\n" else "␡" if c == "\x7f" else c
        for c in plain
    )


def table(name: str, of: Table) -> str:
    """A table whose first column names the rows; the best cells are bold."""
    # An arrow stays on the line of the word before it.
    heads = [re.sub(r"\s+([↓↑])$", "\N{NO-BREAK SPACE}\\1", column) for column in of.columns]
    head = "".join(f'<th scope="col">{escaped(column)}</th>' for column in heads)
    best, body = of.best(), []
    for r, row in enumerate(of.printed()):
        cells = [f'<th scope="row">{escaped(row[0])}</th>'] if row else []
        for c, cell in enumerate(row[1:], start=1):
            bold = (r, c) in best
            cells.append(f"<td>{'<strong>' * bold}{escaped(cell)}{'</strong>' * bold}</td>")
        body.append("<tr>" + "".join(cells) + "</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(name)}, scrolls '
        f'sideways"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
        "</div>"
    )
