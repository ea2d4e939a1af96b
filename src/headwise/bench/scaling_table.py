"""What was measured as work grows, as tables: slopes, and every point."""

from collections.abc import Sequence
from typing import Any

import rich.table

from headwise.bench.scaling import FIGURES, by_series
from headwise.bench.table import document, milliseconds, number, where
from headwise.results.rows import Row
from headwise.results.table import Cell, Number, Table

# Of slopes: the times of a series are good to some percent, and double once or more.
_NOISE = 0.05
_LEAST = {"time": "limit_ms", "memory": "kept_mib"}
_LEGEND = (
    "Figures at the largest size, in milliseconds (medians of interleaved runs) or in MiB that a "
    "run adds to the process at its peak. Least, of time: reading what must be read at this "
    "machine's bandwidth, or computing what must be computed as fast as torch's best matrix "
    "products here, whichever takes longer; "
    "of memory: results, keys and values. Slope: of the logarithm of the figure against that of "
    "the size, over the larger half of the sizes; 1 grows as fast as the size, 2 as its square. "
    f"✗: grows faster than the rival's, by more than {_NOISE}: a defect. Every time passed the "
    "correctness gate first."
)
_COLUMNS = (
    "case", "shape", "rival", "grows", "dtype", "figure", "ours", "rival's", "least", "slope",
    "rival's slope",
)  # fmt: skip
_POINTS = (
    "case", "shape", "dtype", "rival", "ours (ms)", "rival's (ms)", "least (ms)", "ours (MiB)",
    "rival's (MiB)", "least (MiB)",
)  # fmt: skip


def slopes(rows: Sequence[Row]) -> Table:
    """A line for each series by time, and by memory where that was measured."""
    cells = [
        cells
        for members in by_series(rows).values()
        for figure in FIGURES
        if (cells := _cells(members, figure))
    ]
    return Table(_COLUMNS, cells, _LEGEND, where(rows), left=6)


def for_terminal(rows: Sequence[Row]) -> rich.table.Table:
    """The slopes, narrow: what a series is about stands below its name."""
    whole = slopes(rows)
    lines = [
        [f"{case}\n{grows}, {dtype}", rival, figure, *figures]
        for case, _, rival, grows, dtype, figure, *figures in whole.rows
    ]
    columns = ["case", "rival", "figure", *whole.columns[6:]]
    narrow = Table(columns, lines, f"{whole.legend} {whole.measured_on}.", left=3)
    return narrow.for_terminal("headwise bench scaling")


def is_defect(row: Row, figure: str) -> bool:
    """Whether a figure of the row's series grows faster than the rival's."""
    ours, theirs = (row[f"{who}_{figure}_slope"] for who in ("ours", "rival"))
    if "" in (ours or "", theirs or ""):
        return False
    return float(ours) > float(theirs) + _NOISE


def page(rows: Sequence[Row], chart: str) -> str:
    """A page that needs nothing else: the chart (SVG), the slopes and every point."""
    points = Table(_POINTS, [_point(row) for row in rows], "Least: as above.", where(rows), left=4)
    tables = {"How fast they grow": slopes(rows), "Every point": points}
    return document("What more work costs", chart, tables)


def _cells(rows: Sequence[Row], figure: str) -> list[Cell]:
    """The line of a series, empty if there is nothing to say; a file's numbers are text."""
    names = FIGURES[figure]
    known = [row for row in rows if all(row[name] not in (None, "") for name in names)]
    ours, theirs = (rows[0][f"{who}_{figure}_slope"] for who in ("ours", "rival"))
    # Memory without a slope is too little to be told from noise.
    if not known or (figure == "memory" and not (ours or theirs)):
        return []
    first, last = known[0], known[-1]
    mark = " ✗" if is_defect(last, figure) else ""
    return [
        last["case"],
        last["shape"],
        last["rival"],
        f"{last['axis']} {int(first['size']):,} to {int(last['size']):,}",
        last["dtype"],
        figure,
        *(_shown(last[name]) for name in (*names, _LEAST[figure])),
        number(ours, f"{{:.2f}}{mark}"),
        number(theirs, "{:.2f}"),
    ]


def _point(row: Row) -> list[Cell]:
    names = [name for figure in FIGURES for name in (*FIGURES[figure], _LEAST[figure])]
    figures = [_shown(row[name]) for name in names]
    if row["correct"] not in (True, "True"):
        figures = [f"wrong result, error ×{row['error_ratio']}", *[""] * (len(names) - 1)]
    return [row["case"], row["shape"], row["dtype"], row["rival"], *figures]


def _shown(value: Any) -> Number | str:
    return "" if value in (None, "") else milliseconds(value)
