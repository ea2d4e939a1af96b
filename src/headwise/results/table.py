"""Tables whose cells stay numbers until they are printed: on a terminal, as Markdown, on a page."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD

_TERMINAL = 80  # columns
# What may stand in a form. Files hold forms, too, and Python's format does more than print.
_FORM = re.compile(r"[^{}]*(\{(:,?(\.\d[fg%])?)?\}[^{}]*)?")


@dataclass(frozen=True)
class Number:
    """A number in a table, and how it is printed.

    Example: Number(407.31, "{:.1f}", 26.93, " ± {:.1f}", " (380–428)") prints
    "407.3 ± 26.9 (380–428)".

    Attributes:
        value: The number; of several runs the mean.
        form: How it is printed: text with one pair of braces, such as "{:.2f} %".
        spread: Deviation or error; None where none is known.
        spread_form: How the spread is printed, behind the number.
        note: Text behind both.
    """

    value: float
    form: str = "{}"
    spread: float | None = None
    spread_form: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("form", "spread_form"):
            if not _FORM.fullmatch(getattr(self, name)):
                raise ValueError(f'{name} is {getattr(self, name)!r}; it must be as "{{:.2f}} %"')

    def __str__(self) -> str:
        spread = "" if self.spread is None else self.spread_form.format(self.spread)
        return self.form.format(self.value) + spread + self.note


Cell = Number | str


def mean(
    values: Sequence[float], form: str, spread_form: str | None = None, note: str = ""
) -> Cell:
    """Mean ± standard deviation, such as "1.50 ± 0.02"; equal values have no spread.

    Args:
        values: What was measured; "–" if nothing was.
        form: Form of the mean, such as "{:.2f}".
        spread_form: Form of the deviation. Default: the mean's.
        note: Text behind both.
    """
    if not values:
        return "–"
    spread = None if min(values) == max(values) else statistics.stdev(values)
    return Number(statistics.fmean(values), form, spread, f" ± {spread_form or form}", note)


def has_spread(rows: Sequence[Sequence[Cell]]) -> bool:
    """Whether any number has a deviation or an error, which a legend then explains."""
    return any(isinstance(x, Number) and x.spread is not None for row in rows for x in row)


@dataclass(frozen=True)
class Table:
    """Rows of cells under column heads.

    Attributes:
        columns: Heads, with units. An arrow at the end says which way is better: "loss (nats) ↓".
        rows: A cell a column; text names what a row is of, or says why there is no number.
        legend: What the columns are, in sentences.
        measured_on: Device and versions; empty for what is computed by formula.
        left: How many columns, from the first on, are set left; the others are set right.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    legend: str = ""
    measured_on: str = ""
    left: int = 1

    def printed(self) -> list[list[str]]:
        """The rows as text."""
        return [[str(cell) for cell in row] for row in self.rows]

    def best(self) -> set[tuple[int, int]]:
        """Cells (row, column) to mark in columns that end in ↓ or ↑.

        Marked are the best number and all within the column's largest spread of it, so that no
        winner is named inside the spread. A column without any spread has an unknown one: nothing
        is marked.

        Example: of "1.50 ± 0.02", "1.51 ± 0.01" and "1.60" under "loss ↓" the first two are marked.
        """
        marked = set()
        for index, column in enumerate(self.columns):
            sign = {"↓": 1, "↑": -1}.get(column[-1:])
            known = {r: x for r, row in enumerate(self.rows) if isinstance(x := row[index], Number)}
            spread = max((number.spread or 0 for number in known.values()), default=0)
            if sign is None or len(known) < 2 or not spread:
                continue
            most = min(sign * number.value for number in known.values()) + spread + 1e-12
            marked |= {(r, index) for r, number in known.items() if sign * number.value <= most}
        return marked

    def without(self, columns: Sequence[str]) -> "Table":
        """The same without some columns."""
        kept = [i for i, column in enumerate(self.columns) if column not in columns]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)

    def markdown(self) -> str:
        """A Markdown table, its legend, and what it was measured on."""
        right = len(self.columns) - self.left
        lines = [self.columns, ["---"] * self.left + ["---:"] * right, *self.printed()]
        drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        measured = f"Measured on {self.measured_on}.\n" if self.measured_on else ""
        return f"{drawn}\n\n{self.legend}\n{measured}"

    def for_terminal(self, title: str | None = None, padding: int = 1) -> rich.table.Table:
        """A rich table with the legend below, for terminals of 80 columns.

        What stands behind a number (its spread, its quartiles) goes to a line of its own. Where
        whole heads are too wide together, each is broken between words, as narrow as it can be.

        Args:
            title: What stands above.
            padding: Columns of the terminal between two of the table, beside one.
        """
        shown: Any = rich.table.Table(
            title=title, caption=self.legend or None, box=SIMPLE_HEAD, show_edge=False,
            padding=(0, padding, 0, 0),
        )  # fmt: skip
        rows = [
            [re.sub(r" (?=± |\()", "\n", str(x)) if isinstance(x, Number) else x for x in row]
            for row in self.rows
        ]
        cells = [[x for row in rows for x in row[i].split("\n")] for i in range(len(self.columns))]
        whole = [max(map(len, [*x, head])) for x, head in zip(cells, self.columns, strict=True)]
        if sum(whole) + (padding + 1) * len(whole) <= _TERMINAL:
            widths = whole
        else:
            heads = (head.split() for head in self.columns)
            widths = [max(map(len, x + words)) for x, words in zip(cells, heads, strict=True)]
        for index, (column, width) in enumerate(zip(self.columns, widths, strict=True)):
            if index < self.left:
                shown.add_column(column)
            else:
                shown.add_column(column, justify="right", max_width=width, overflow="fold")
        for row in rows:
            shown.add_row(*row)
        return shown
