"""Scores of models side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from headwise.results.rows import Row, measured_on
from headwise.results.table import Cell, Number, Table, has_spread
from headwise.training.directory import MODELS

_LEGEND = "n: documents of the task, the same for every model."
_ERROR = " ±: standard error of a score over them."
_MEAN = " mean: of all acc, its error as if the tasks were independent."


def comparison(rows: Sequence[Row]) -> Table:
    """A line a task and metric, a column a model; what a group sums up is left out."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if not row["group"]:
            line = lines.setdefault((row["task"], row["metric"], str(row["documents"])), {})
            line[row["model"]] = row
    cells = [[*key, *(_cell([line[model]]) for model in models)] for key, line in lines.items()]
    legend = _LEGEND + (_ERROR if has_spread(cells) else "")
    accuracies = [line for (_, metric, _), line in lines.items() if metric == "acc"]
    if len(accuracies) > 1:
        legend += _MEAN
        cells.append(
            ["mean", "acc", "", *(_cell([x[model] for x in accuracies]) for model in models)]
        )
    where = measured_on(
        rows, "{device}, {precision}", ("lm_eval", "torch", "transformers", "python")
    )
    return Table(["task", "metric", "n", *_headings(models)], cells, legend, where, left=2)


def _headings(models: Sequence[str]) -> Sequence[str]:
    """The last parts of the paths where they differ; of a run's models, the run before them."""
    names = [
        f"{path.parts[-3]}/{path.name}" if MODELS in path.parts[-2:-1] else path.name
        for path in map(Path, models)
    ]
    return names if len(set(names)) == len(names) else models


def _cell(rows: Sequence[Row]) -> Cell:
    """The score of a row, or the mean of several."""
    value = fmean(float(row["value"]) for row in rows)
    errors = [row["standard_error"] for row in rows]
    if any(error in (None, "") for error in errors):
        return Number(value, "{:.3f}")
    error = math.sqrt(sum(float(error) ** 2 for error in errors)) / len(errors)
    return Number(value, "{:.3f}", error, " ±{:.3f}")
