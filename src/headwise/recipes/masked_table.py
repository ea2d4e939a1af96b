"""The table of a masked run: perplexity of masked text and patches at equal FLOPs."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headwise.recipes.masked import LABELS

Row = dict[str, Any]

LEGEND = (
    "PPL: perplexity of the masked tokens of held-out captions, and of the masked patches of "
    "held-out images, the same for all models; guess: of who knows only how frequent they are. "
    "MFLOPs: of a forward, per token or patch, by formula; counted: what torch's counter saw run. "
    "tokens/s: training, patches included, median step. ±: deviation over seeds."
)
_COLUMNS = {
    "params (M)": ("parameters", "{:.2f}", 1e-6),
    "active (M)": ("active_parameters", "{:.2f}", 1e-6),
    "MFLOPs": ("flops_per_token", "{:.3f}", 1e-6),
    "counted": ("flops_per_token_counted", "{:.3f}", 1e-6),
    "PPL text ↓": ("perplexity_text", "{:.3f}", 1),
    "PPL patches ↓": ("perplexity_patches", "{:.3f}", 1),
    "tokens/s ↑": ("tokens_per_second", "{:,.0f}", 1),
}


def comparison(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column heads with units, and one row of cells a model: see `LEGEND`."""
    cells = [["guess"] + [_guess(rows[0], key, form) for key, form, _ in _COLUMNS.values()]]
    for name in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == name]
        cells.append([LABELS[name], *(_mean(runs, *column) for column in _COLUMNS.values())])
    return ["model", *_COLUMNS], cells


def for_terminal(rows: Sequence[Row]) -> Table:
    """The comparison as a rich table."""
    columns, cells = comparison(rows)
    table = Table(
        title="At equal FLOPs per token", caption=LEGEND, box=SIMPLE_HEAD, show_edge=False
    )
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column.replace(" ", "\n", 1), justify="right")
    for line in cells:
        table.add_row(*(cell.replace(" ±", "\n±") for cell in line))
    return table


def _guess(row: Row, key: str, form: str) -> str:
    guess = row.get(key.replace("perplexity", "guess")) if "perplexity" in key else None
    return "" if guess is None else form.format(float(guess))


def _mean(runs: Sequence[Row], key: str, form: str, scale: float) -> str:
    values = [float(row[key]) * scale for row in runs]
    text = form.format(statistics.fmean(values))
    if len(values) == 1 or min(values) == max(values):
        return text
    return f"{text} ± {form.format(statistics.stdev(values))}"
