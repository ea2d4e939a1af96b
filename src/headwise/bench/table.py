"""Rows of the benchmark as a table for the terminal, for README.md and as a page."""

from collections.abc import Sequence
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headwise.bench.comparison import Row
from headwise.training.table import in_markdown

COLUMNS = (
    "case", "shape", "dtype", "heads on", "rival", "ours", "rival's", "ratio", "ideal",
    "of ideal", "target",
)  # fmt: skip
LEGEND = (
    "Times in milliseconds, medians of interleaved runs. Ratio: ours / rival's, below 1 is faster. "
    "Ideal: the ratio if heads that are off cost nothing and the rest ran at the rival's speed. "
    "Target: what headwise set out to reach; ✓ reached, ✗ missed. Every row passed the "
    "correctness gate first: an error against float64 of at most twice plain PyTorch's."
)


def for_terminal(rows: Sequence[Row]) -> Table:
    """The rows of one benchmark as a rich table."""
    table = Table(
        title=f"headwise bench {rows[0]['benchmark']}",
        caption=f"{LEGEND} {measured_on(rows)}.",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    table.add_column("case", max_width=30)
    table.add_column("rival", max_width=12)
    for name in ("ours", "rival's", "ratio", "of ideal", "target"):
        table.add_column(name, justify="right", no_wrap=name != "of ideal")
    for row in rows:
        case, shape, dtype, share, rival, ours, theirs, ratio, _, of_ideal, target = _cells(row)
        about = ", ".join(part for part in (shape, dtype, share) if part)
        style = "" if row["correct"] in (True, "True") else "bold red"
        cells = (f"{case}\n{about}", rival, ours, theirs, ratio, of_ideal, target)
        table.add_row(*cells, style=style)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Some of the rows as a Markdown table; results/performance.csv has all."""
    table = in_markdown(COLUMNS, [_cells(row) for row in rows if _is_shown(row)], left=5)
    return f"{table}\n\n{LEGEND}\nMeasured on {measured_on(rows)}.\n"


def summary(rows: Sequence[Row]) -> str:
    """With half of the heads on: one line a case, the ratios by dtype; see `markdown` for more."""
    half = [
        row
        for row in rows
        if _is_shown(row)
        and "T=512" not in row["shape"]
        and (row["benchmark"] == "experts" or float(row["share"]) == 0.5)
    ]
    dtypes = list(dict.fromkeys(row["dtype"] for row in half))
    cases: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in half:
        *_, ratio, _, _, target = _cells(row)
        key = (row["case"], row["shape"], row["rival"])
        mark = target.partition(" ")[2]
        cases.setdefault(key, {})[row["dtype"]] = f"{ratio} {mark}".strip()
    columns = ["case", "shape", "rival", *dtypes]
    cells = [[*key, *(ratios.get(dtype, "") for dtype in dtypes)] for key, ratios in cases.items()]
    legend = (
        "Half of the heads on. Our time over the rival's, below 1 is faster; medians of "
        "interleaved runs. ✓ or ✗: whether it is what headwise set out to reach."
    )
    return f"{in_markdown(columns, cells, left=3)}\n\n{legend}\nMeasured on {measured_on(rows)}.\n"


def on_a_gpu(rows: Sequence[Row]) -> str:
    """A line for each case and rival, but mask-only MoH, and the ratios by share of heads on."""
    shown = [row for row in rows if row["rival"] != "mask-only MoH"]
    cases: dict[tuple[str, ...], dict[float, str]] = {}
    for row in shown:
        key = (row["case"], row["shape"], row["rival"])
        cases.setdefault(key, {})[float(row["share"])] = f"{float(row['ratio']):.2f}{_mark(row)}"
    shares = sorted({float(row["share"]) for row in shown})
    columns = ["case", "shape", "rival", *(f"{share:.0%}" for share in shares)]
    cells = [[*key, *(ratios.get(x, "") for x in shares)] for key, ratios in cases.items()]
    legend = (
        "By share of the heads that are on: our time over the rival's, faster below 1; bfloat16, "
        "medians of interleaved runs, kernels alone but for whole models. ✓ or ✗: whether it is "
        "what headwise set out to reach."
    )
    return f"{in_markdown(columns, cells, left=3)}\n\n{legend}\nMeasured on {measured_on(rows)}.\n"


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
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) + "</tr>"
        for row in rows
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>headwise bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem }}
svg {{ max-width: 100%; height: auto }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }}
th, td {{ padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #dde1e6 }}
td:nth-child(n+6), th:nth-child(n+6) {{ text-align: right }}
</style>
<h1>What skipping heads saves</h1>
{chart}
<div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>{escape(LEGEND)} Measured on {escape(measured_on(rows))}.</p>
</html>
"""


def measured_on(rows: Sequence[Row]) -> str:
    """Device and versions."""
    row = rows[0]
    versions = ", ".join(f"{k} {row[k]}" for k in ("torch", "transformers", "headwise", "python"))
    return f"{row['device']}, {row['threads']} threads; {versions}"


def _cells(row: Row) -> list[str]:
    share = float(row["share"])
    cells = [
        row["case"],
        row["shape"],
        row["dtype"],
        f"{share:.0%}" if row["benchmark"] != "experts" else "",
        row["rival"],
    ]
    if row["correct"] not in (True, "True"):
        return [*cells, "wrong result", "", "", "", "", f"error ×{row['error_ratio']}"]
    ratio, target = _number(row["ratio"]), _number(row["target"])
    ideal, of_ideal = _number(row["ideal"]), _number(row["share_of_ideal"])
    return [
        *cells,
        _milliseconds(row["ours_ms"]),
        _milliseconds(row["rival_ms"]),
        f"{ratio:.2f}",
        "" if ideal is None else f"{ideal:.2f}",
        "" if of_ideal is None else f"{of_ideal:.0%}",
        "" if target is None else f"{target:.2f}{_mark(row)}",
    ]


def _mark(row: Row) -> str:
    """Whether the target is reached, where there is one."""
    ratio, target = _number(row["ratio"]), _number(row["target"])
    return "" if ratio is None or target is None else " ✓" if ratio <= target else " ✗"


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)


def _milliseconds(value: Any) -> str:
    return f"{float(value):.3g}" if float(value) < 100 else f"{float(value):.0f}"
