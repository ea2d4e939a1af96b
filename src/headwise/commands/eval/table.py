"""Scores of models side by side, for the terminal and for Markdown."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headwise.training.directory import MODELS
from headwise.training.table import Row, in_markdown

LEGEND = (
    "± is the standard error of a score over the task's documents (n), of which the models see the "
    "same. The mean is that of all acc, its error as if the tasks were independent."
)


def comparison(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A line a task and metric, a column a model; what a group sums up is left out."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if not row["group"]:
            line = lines.setdefault((row["task"], row["metric"], str(row["documents"])), {})
            line[row["model"]] = row
    cells = [[*key, *(_cell([line[model]]) for model in models)] for key, line in lines.items()]
    accuracies = [line for (_, metric, _), line in lines.items() if metric == "acc"]
    if len(accuracies) > 1:
        cells.append(
            ["mean", "acc", "", *(_cell([x[model] for x in accuracies]) for model in models)]
        )
    return ["task", "metric", "n", *_headings(models)], cells


def for_terminal(rows: Sequence[Row]) -> Table:
    """The comparison as a rich table."""
    columns, cells = comparison(rows)
    table = Table(*columns[:2], box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in columns[2:]:
        table.add_column(heading, justify="right", overflow="fold")
    for line in cells:
        table.add_row(*line)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table, its legend, and what it was measured on."""
    columns, cells = comparison(rows)
    table = in_markdown(columns, cells, left=2)
    row = rows[0]
    versions = ", ".join(f"{k} {row[k]}" for k in ("lm_eval", "torch", "transformers", "python"))
    return f"{table}\n\n{LEGEND}\nMeasured on {row['device']}, {row['precision']}; {versions}.\n"


def _headings(models: Sequence[str]) -> Sequence[str]:
    """The last parts of the paths where they differ; of a run's models, the run before them."""
    names = [
        f"{path.parts[-3]}/{path.name}" if MODELS in path.parts[-2:-1] else path.name
        for path in map(Path, models)
    ]
    return names if len(set(names)) == len(names) else models


def _cell(rows: Sequence[Row]) -> str:
    """The score of a row, or the mean of several."""
    value = statistics.fmean(float(row["value"]) for row in rows)
    errors = [row["standard_error"] for row in rows]
    if any(error in (None, "") for error in errors):
        return f"{value:.3f}"
    error = math.sqrt(sum(float(error) ** 2 for error in errors)) / len(errors)
    return f"{value:.3f} ±{error:.3f}"
