"""Results as data (one CSV row a model and seed) and as a table for people."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headwise.analysis.spread import with_spread
from headwise.errors import reading
from headwise.files import write_whole
from headwise.training.measures import measures
from headwise.training.published import PUBLISHED

Row = dict[str, Any]


_OF_CLASSIFIERS = "top-1, top-5: accuracy on the held-out images."
_OF_DRAWERS = (
    "recognised: drawn images that a classifier of the real ones takes for the class that was "
    "asked for; FID, sFID, IS (Inception Score), precision and recall by its features, comparable "
    "within this table only."
)
_MEASURED = {
    "dit": _OF_DRAWERS,
    "dit-budget": _OF_DRAWERS,
    "vit": _OF_CLASSIFIERS,
    "vit-budget": _OF_CLASSIFIERS,
    "masked": "PPL: perplexity of the masked tokens of held-out captions, and of the masked "
    "patches of held-out images, coded as the nearest of a codebook; the same for all models.",
}
_COST = (
    "MFLOPs: of a forward, per {}, by formula, without heads that are off; counted: what "
    "torch's counter saw run."
)
_OVER_SEEDS = "±: deviation over seeds."
_MOST_WITH_QUARTILES = 3  # measures
_PUBLISHED = " (published)"
_SPEED = "{}s/s: training, median step."


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write beside, then rename."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote; every value is text."""
    with reading(path, "a table"), path.open(newline="") as file:
        return list(csv.DictReader(file))


def comparison(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column heads with units, and one row of cells a model: see `legend`.

    Where a paper published the same comparison, its figures stand in the last columns.
    """
    published = PUBLISHED.get(rows[0]["recipe"])
    columns = [
        "model",
        "params (M)",
        "active (M)",
        "MFLOPs",
        "counted",
        "heads on",
        *(measure.column for measure in measures(rows[0])),
        *([f"{rows[0]['unit']}s/s ↑"] if _alone(rows) else []),
        *(f"{column}{_PUBLISHED}" for column in (published.columns if published else ())),
    ]
    quartiles = _with_quartiles(rows)
    cells = []
    for name in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == name]
        cells.append([
            runs[0]["label"],
            _mean(runs, "parameters", "{:.2f}", 1e-6),
            _mean(runs, "active_parameters", "{:.2f}", 1e-6),
            _mean(runs, "flops", "{:.2f}", 1e-6),
            _mean(runs, "flops_counted", "{:.2f}", 1e-6),
            _mean(runs, "active_heads", "{:.0f} %", 100),
            *(_value(runs, measure.key, quartiles) for measure in measures(rows[0])),
            *([_mean(runs, "per_second", "{:,.0f}")] if _alone(rows) else []),
            *(published.of(name) if published else ()),
        ])  # fmt: skip
    return columns, cells


def _alone(rows: Sequence[Row]) -> bool:
    """Whether each model had the machine for itself; otherwise its speed says little."""
    return all(int(row["workers"]) == 1 for row in rows)


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table, its legend, and what it was measured on."""
    columns, cells = comparison(rows)
    table = in_markdown(columns, cells)
    return f"{table}\n\n{legend(rows)}\nMeasured on {measured_on(rows)}.\n"


def legend(rows: Sequence[Row]) -> str:
    """What the columns are, and where published ones come from."""
    recipe = rows[0]["recipe"]
    sentences = [_measured(rows), _COST.format(rows[0]["unit"])]
    if len({row["seed"] for row in rows}) > 1:
        sentences.append(_OVER_SEEDS)
    if _alone(rows):
        sentences.append(_SPEED.format(rows[0]["unit"]))
    if published := PUBLISHED.get(recipe):
        sentences.append(
            f"{_PUBLISHED.strip()}: {published.what}, by {published.source}; not measured here."
        )
    return " ".join(sentences)


def _measured(rows: Sequence[Row]) -> str:
    recipe, blocks = rows[0]["recipe"], rows[0].get("eval_blocks_per_file")
    if recipe in _MEASURED or blocks is None:
        return _MEASURED[recipe]
    quartiles = ", in brackets the quartiles of the files" if _with_quartiles(rows) else ""
    return f"PPL: perplexity of the held-out files, of up to {blocks} blocks of each{quartiles}."


def in_markdown(columns: Sequence[str], cells: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lines of a Markdown table; the first `left` columns are set left, the others right."""
    lines = [columns, ["---"] * left + ["---:"] * (len(columns) - left), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_on(rows: Sequence[Row]) -> str:
    """Training, seeds, device and versions of the rows."""
    row = rows[0]
    seeds = ", ".join(dict.fromkeys(str(r["seed"]) for r in rows))
    versions = ", ".join(f"{k} {row[k]}" for k in ("torch", "transformers", "python"))
    return (
        f"{row['device']}, {row['threads']} thread(s), {row['precision']}; {row['steps']} steps, "
        f"{int(row['seen']):,} {row['unit']}s a model, seeds {seeds}; {versions}"
    )


def for_terminal(rows: Sequence[Row], title: str) -> Table:
    """The comparison as a rich table, narrow enough for 80 columns: published figures have a †."""
    columns, cells = comparison(rows)
    minor = [measure.column for measure in measures(rows[0]) if measure.minor]
    crowded = bool(minor) or any(_PUBLISHED in column for column in columns)
    left_out = ["active (M)", "counted", *minor] if crowded else []
    shown = [i for i, column in enumerate(columns) if column not in left_out]
    more = f" Not shown here: {', '.join(left_out)}; results.csv has them." if left_out else ""
    table = Table(
        title=title,
        caption=legend(rows).replace(_PUBLISHED.strip(), "†") + more,
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    broken = [[cell.replace(" ±", "\n±").replace(" (", "\n(") for cell in line] for line in cells]
    for index in shown:
        column = columns[index].replace(_PUBLISHED, "†")
        parts = [part for line in broken for part in line[index].split("\n")]
        width = max(map(len, parts + column.split()))
        if index:
            table.add_column(column, justify="right", width=width)
        else:
            table.add_column(column, min_width=min(width, 16))
    for line in broken:
        table.add_row(*(line[index] for index in shown))
    return table


def _mean(runs: Sequence[Row], key: str, form: str, scale: float = 1) -> str:
    return with_spread([float(r[key]) * scale for r in runs if r[key] not in ("", None)], form)


def _with_quartiles(rows: Sequence[Row]) -> bool:
    """Whether they are there, and the columns few enough to hold them."""
    return len(measures(rows[0])) <= _MOST_WITH_QUARTILES and any("_q1" in key for key in rows[0])


def _value(runs: Sequence[Row], key: str, with_quartiles: bool) -> str:
    least = min(float(row[key]) for row in runs)
    value = _mean(runs, key, "{:.1f}" if least >= 20 else "{:.2f}")
    if not with_quartiles:
        return value
    low, high = (statistics.fmean(float(row[f"{key}_{q}"]) for row in runs) for q in ("q1", "q3"))
    return f"{value} ({low:.0f}–{high:.0f})"
