"""Rows of the benchmark as tables: for the terminal, for README.md and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import rich.table

from headwise.results import html
from headwise.results.rows import Row, measured_on
from headwise.results.table import Cell, Number, Table

_COLUMNS = (
    "case", "shape", "dtype", "heads on", "rival", "ours", "rival's", "ratio", "ideal",
    "of ideal", "of limit", "rival's of limit", "target",
)  # fmt: skip
_LIMITS = ("of limit", "rival's of limit")
_LEGEND = (
    "Times in milliseconds, medians of interleaved runs. Ratio: ours / rival's, below 1 is faster. "
    "Ideal: the ratio if heads that are off cost nothing and the rest ran at the rival's speed. "
    "{}Target: what headwise set out to reach; ✓ reached, ✗ missed. Every row passed the "
    "correctness gate first: an error against float64 of at most twice plain PyTorch's."
)
_LIMIT = (
    "Limit: the time that must pass, the longer of two: reading the weights, and the keys and "
    "values of heads that are on, at the bandwidth of this machine, and computing what is left "
    "as fast as torch's best matrix products here, both measured in the same run. A cache may read "
    "faster, and other products may be faster: then there is more than 100 %. "
    "Where there is one, the ideal is the ratio of both limits. "
)
_RATIO = (
    "Ratios, ours / rival's, of times (medians of interleaved runs); below 1 ours is faster. Core: "
    "attention alone, without projections and router. ✓: reaches the target that headwise set "
    "itself; ✗: misses it; neither: no target."
)
_HALF = f"Half of the heads on, or as said. {_RATIO} Peak memory: a ratio, too."
_BY_SHARE = f"Columns: share of the heads that are on. {_RATIO} All in bfloat16."


def performance(rows: Sequence[Row]) -> Table:
    """Some of the rows; results/performance.csv has all."""
    return full([row for row in rows if _is_shown(row)])


def full(rows: Sequence[Row]) -> Table:
    """Every row; of machines' limits nothing where none was measured, as in older files."""
    limited = any(_limit(row) for row in rows)
    legend = _LEGEND.format(_LIMIT if limited else "")
    table = Table(_COLUMNS, [_cells(row) for row in rows], legend, where(rows), left=5)
    return table if limited else table.without(_LIMITS)


def summary(rows: Sequence[Row]) -> Table:
    """With half of the heads on: one line a case, the ratios by dtype.

    Of whole models also other shares, where they lose.
    """
    lost = lost_lines(rows)
    shown = [
        row
        for row in rows
        if _is_shown(row)
        and "T=512" not in row["shape"]
        and (row["benchmark"] == "experts" or float(row["share"]) == 0.5 or line_of(row) in lost)
    ]
    heads = {row["dtype"]: row["dtype"] for row in shown}
    return replace(_ratios(shown, heads, "dtype"), legend=_HALF, measured_on=where(rows))


def line_of(row: Row) -> tuple[str, ...]:
    """What rows of one line differ in: all but the dtype."""
    return row["case"], row["shape"], row["rival"], str(row["share"])


def lost_lines(rows: Sequence[Row]) -> set[tuple[str, ...]]:
    """Lines of whole models that take longer than the rival, in one dtype at least."""
    return {
        line_of(row)
        for row in rows
        if row["benchmark"] == "model" and row["ratio"] and float(row["ratio"]) > 1
    }


def on_a_gpu(rows: Sequence[Row]) -> Table:
    """A line for each case and rival, but mask-only MoH, and the ratios by share of heads on.

    Cases of another GPU than the first one's name it.
    """
    usual = rows[0]["device"]
    shown = [
        row if row["device"] == usual else {**row, "case": f"{row['case']} ({row['device']})"}
        for row in rows
        if row["rival"] != "mask-only MoH"
    ]
    shares = sorted({row["share"] for row in shown}, key=float)
    heads = {share: f"{float(share):.0%}" for share in shares}
    return replace(_ratios(shown, heads, "share"), legend=_BY_SHARE, measured_on=where(rows))


def _ratios(rows: Sequence[Row], heads: dict[Any, str], by: str) -> Table:
    """A line for each case and rival; a column of ratios for each value of the row's `by`."""
    lines: dict[tuple[str, ...], dict[Any, Cell]] = {}
    for row in rows:
        case = row["case"].replace(" (MiB)", "")  # a ratio has no unit
        share = float(row["share"])
        if by != "share" and row["benchmark"] == "model" and share != 0.5:
            case += f", {share:.0%} of heads on"
        line = lines.setdefault((case, row["shape"], row["rival"]), {})
        line[row[by]] = _ratio(row)
    cells = [[*key, *(line.get(x, "") for x in heads)] for key, line in lines.items()]
    return Table(["case", "shape", "rival", *heads.values()], cells, left=3)


def for_terminal(rows: Sequence[Row]) -> rich.table.Table:
    """The rows of one benchmark, narrow: what a case is about stands below its name."""
    whole = full(rows).without(["ideal"])
    lines = []
    for case, shape, dtype, share, rival, *figures in whole.rows:
        about = ", ".join(part for part in map(str, (shape, dtype, share)) if part)
        lines.append([f"{case}\n{about}", rival, *figures])
    columns = ["case", *whole.columns[4:]]
    table = Table(columns, lines, f"{whole.legend} {whole.measured_on}.", left=2)
    # A benchmark without targets, or without ideals, needs no columns for them.
    empty = [name for i, name in enumerate(columns) if not any(line[i] for line in lines)]
    shown = table.without(empty).for_terminal(f"headwise bench {rows[0]['benchmark']}")
    for line, row in zip(shown.rows, rows, strict=True):
        line.style = "" if _is_correct(row) else "bold red"
    return shown


def _is_shown(row: Row) -> bool:
    """Of attention the shortest and the longest, of decoding the largest batch, of the rest all.

    Beside torch's own attention the others stand once.
    """
    if row["benchmark"] == "attention":
        plain = not any(word in row["case"] + row["shape"] for word in ("skewed", "kv"))
        length, share = row["shape"].split(",")[0], float(row["share"])
        short = length == "T=512" and "causal" in row["case"]
        long = length == "T=4096" and share >= 0.5 and not ("full" in row["case"] and share != 0.5)
        others = length == "T=4096" and share == 0.5 and "full" not in row["case"]
        fast = row["rival"].startswith("SDPA") and (short or long)
        return plain and (fast or others)
    return row["benchmark"] != "decode" or "B=8" in row["shape"]


def page(rows: Sequence[Row], chart: str) -> str:
    """A page that needs nothing else: the chart (SVG) and every row."""
    return document("What skipping heads saves", chart, {"Times": full(rows)})


def document(title: str, chart: str, tables: Mapping[str, Table]) -> str:
    """A page that needs nothing else: a chart (SVG), then tables by name."""
    right, shown = [], []
    for number, (name, each) in enumerate(tables.items()):
        right += [f"#table{number} {cell}:nth-child(n+{each.left + 1})" for cell in ("td", "th")]
        shown.append(f"""<section id="table{number}">
<h2>{escape(name)}</h2>
{html.table(name, each)}
<p>{escape(each.legend)} Measured on {escape(each.measured_on)}.</p>
</section>
""")
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
{", ".join(right)} {{ text-align: right }}
</style>
<h1>{escape(title)}</h1>
{chart}
{"".join(shown)}</html>
"""


def where(rows: Sequence[Row]) -> str:
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
        return [*cells, "wrong result", "", "", "", "", "", "", f"error ×{row['error_ratio']}"]
    return [
        *cells,
        milliseconds(row["ours_ms"]),
        milliseconds(row["rival_ms"]),
        number(row["ratio"], "{:.2f}"),
        number(row["ideal"], "{:.2f}"),
        number(row["share_of_ideal"], "{:.0%}"),
        number(_limit(row), "{:.0%}"),
        number(row.get("rival_of_limit"), "{:.0%}"),
        number(row["target"], f"{{:.2f}}{_mark(row)}"),
    ]


def _limit(row: Row) -> Any:
    """The limit as a share of our time; older files have none."""
    return row.get("of_limit")


def _ratio(row: Row) -> Cell:
    return number(row["ratio"], f"{{:.2f}}{_mark(row)}") or "wrong result"


def _is_correct(row: Row) -> bool:
    return row["correct"] in (True, "True")


def _mark(row: Row) -> str:
    """Whether the target is reached, where there is one."""
    if "" in (row["target"] or "", row["ratio"] or ""):
        return ""
    return " ✓" if float(row["ratio"]) <= float(row["target"]) else " ✗"


def number(value: Any, form: str) -> Cell:
    return "" if value in (None, "") else Number(float(value), form)


def milliseconds(value: Any) -> Number:
    return Number(float(value), "{:.3g}" if float(value) < 100 else "{:.0f}")
