"""Rows of the benchmark as tables: for the terminal, for README.md and as a page."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

import rich.table

from headwise.results import html
from headwise.results.rows import Row, measured_on
from headwise.results.table import Cell, Number, Table

_COLUMNS = (
    "case", "shape", "dtype", "heads on", "rival", "ours", "rival's", "ratio", "ideal",
    "of ideal", "target",
)  # fmt: skip
_LEGEND = (
    "Times in milliseconds, medians of interleaved runs. Ratio: ours / rival's, below 1 is faster. "
    "Ideal: the ratio if heads that are off cost nothing and the rest ran at the rival's speed. "
    "Target: what headwise set out to reach; ✓ reached, ✗ missed. Every row passed the "
    "correctness gate first: an error against float64 of at most twice plain PyTorch's."
)
_RATIO = (
    "Ratios, ours / rival's, of times (medians of interleaved runs); below 1 ours is faster. Core: "
    "attention alone, without projections and router. ✓: reaches the target that headwise set "
    "itself; ✗: misses it; neither: no target."
)
_HALF = f"Half of the heads on. {_RATIO} Peak memory: a ratio, too."
_BY_SHARE = f"Columns: share of the heads that are on. {_RATIO} All in bfloat16."


def performance(rows: Sequence[Row]) -> Table:
    """Some of the rows; results/performance.csv has all."""
    shown = [_cells(row) for row in rows if _is_shown(row)]
    return Table(_COLUMNS, shown, _LEGEND, _where(rows), left=5)


def summary(rows: Sequence[Row]) -> Table:
    """With half of the heads on: one line a case, the ratios by dtype."""
    half = [
        row
        for row in rows
        if _is_shown(row)
        and "T=512" not in row["shape"]
        and (row["benchmark"] == "experts" or float(row["share"]) == 0.5)
    ]
    heads = {row["dtype"]: row["dtype"] for row in half}
    return replace(_ratios(half, heads, "dtype"), legend=_HALF, measured_on=_where(rows))


def on_a_gpu(rows: Sequence[Row]) -> Table:
    """A line for each case and rival, but mask-only MoH, and the ratios by share of heads on."""
    shown = [row for row in rows if row["rival"] != "mask-only MoH"]
    shares = sorted({row["share"] for row in shown}, key=float)
    heads = {share: f"{float(share):.0%}" for share in shares}
    return replace(_ratios(shown, heads, "share"), legend=_BY_SHARE, measured_on=_where(rows))


def _ratios(rows: Sequence[Row], heads: dict[Any, str], by: str) -> Table:
    """A line for each case and rival; a column of ratios for each value of the row's `by`."""
    lines: dict[tuple[str, ...], dict[Any, Cell]] = {}
    for row in rows:
        case = row["case"].replace(" (MiB)", "")  # a ratio has no unit
        line = lines.setdefault((case, row["shape"], row["rival"]), {})
        line[row[by]] = _ratio(row)
    cells = [[*key, *(line.get(x, "") for x in heads)] for key, line in lines.items()]
    return Table(["case", "shape", "rival", *heads.values()], cells, left=3)


def for_terminal(rows: Sequence[Row]) -> rich.table.Table:
    """The rows of one benchmark, narrow: what a case is about stands below its name."""
    lines = []
    for row in rows:
        case, shape, dtype, share, rival, ours, theirs, ratio, _, of_ideal, target = _cells(row)
        about = ", ".join(part for part in map(str, (shape, dtype, share)) if part)
        lines.append([f"{case}\n{about}", rival, ours, theirs, ratio, of_ideal, target])
    columns = ["case", "rival", "ours", "rival's", "ratio", "of ideal", "target"]
    table = Table(columns, lines, f"{_LEGEND} {_where(rows)}.", left=2)
    shown = table.for_terminal(f"headwise bench {rows[0]['benchmark']}")
    for line, row in zip(shown.rows, rows, strict=True):
        line.style = "" if _is_correct(row) else "bold red"
    return shown


def _is_shown(row: Row) -> bool:
    """Of attention the shortest and the longest, of decoding the largest batch, of the rest all."""
    if row["benchmark"] == "attention":
        plain = not any(word in row["case"] + row["shape"] for word in ("skewed", "kv"))
        length, share = row["shape"].split(",")[0], float(row["share"])
        short = length == "T=512" and "causal" in row["case"]
        long = length == "T=4096" and share >= 0.5 and not ("full" in row["case"] and share != 0.5)
        return row["rival"].startswith("SDPA") and plain and (short or long)
    return row["benchmark"] != "decode" or "B=8" in row["shape"]


def page(rows: Sequence[Row], chart: str) -> str:
    """A page that needs nothing else: the chart (SVG) and every row."""
    table = Table(_COLUMNS, [_cells(row) for row in rows], _LEGEND, _where(rows), left=5)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>headwise bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem }}
svg {{ max-width: 100%; height: auto; font-family: Verdana, sans-serif }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }}
th, td {{ padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #dde1e6 }}
tbody th {{ font-weight: normal }}
td:nth-child(n+6), th:nth-child(n+6) {{ text-align: right }}
</style>
<h1>What skipping heads saves</h1>
{chart}
{html.table("Times", table)}
<p>{escape(table.legend)} Measured on {escape(table.measured_on)}.</p>
</html>
"""


def _where(rows: Sequence[Row]) -> str:
    versions = ("torch", "transformers", "headwise", "python")
    return measured_on(rows, "{device}, {threads} threads", versions)


def _cells(row: Row) -> list[Cell]:
    cells: list[Cell] = [
        row["case"],
        row["shape"],
        row["dtype"],
        Number(float(row["share"]), "{:.0%}") if row["benchmark"] != "experts" else "",
        row["rival"],
    ]
    if not _is_correct(row):
        return [*cells, "wrong result", "", "", "", "", f"error ×{row['error_ratio']}"]
    return [
        *cells,
        _milliseconds(row["ours_ms"]),
        _milliseconds(row["rival_ms"]),
        _number(row["ratio"], "{:.2f}"),
        _number(row["ideal"], "{:.2f}"),
        _number(row["share_of_ideal"], "{:.0%}"),
        _number(row["target"], f"{{:.2f}}{_mark(row)}"),
    ]


def _ratio(row: Row) -> Cell:
    return _number(row["ratio"], f"{{:.2f}}{_mark(row)}") or "wrong result"


def _is_correct(row: Row) -> bool:
    return row["correct"] in (True, "True")


def _mark(row: Row) -> str:
    """Whether the target is reached, where there is one."""
    if "" in (row["target"] or "", row["ratio"] or ""):
        return ""
    return " ✓" if float(row["ratio"]) <= float(row["target"]) else " ✗"


def _number(value: Any, form: str) -> Cell:
    return "" if value in (None, "") else Number(float(value), form)


def _milliseconds(value: Any) -> Number:
    return Number(float(value), "{:.3g}" if float(value) < 100 else "{:.0f}")
