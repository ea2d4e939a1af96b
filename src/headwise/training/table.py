"""Rows of a comparison (one a model and seed) as a table for people."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import rich.table

from headwise.results.published import PUBLISHED
from headwise.results.rows import Row, measured_on
from headwise.results.table import Cell, Table, has_spread, mean
from headwise.training.measures import early, measures, mistyped

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
# What rows say of how much was scored; older ones do not.
_SCORED = {
    "scored_images": "Scored: {scored_images:,} images.",
    "scored_pairs": "Scored: {scored_pairs:,} pairs.",
    "real_images": "Drawn: {samples:,} images, compared with {real_images:,} that were trained on.",
}
_FILES = "scored_files_"
_COST = "MFLOPs: of a forward, per {}, by formula, without heads that are off"
_COUNTED = "; counted: what torch's counter saw run"
_OVER_SEEDS = "±: deviation over seeds."
_TYPOS = (
    "typos: the same files with that share of their letters mistyped; words become more tokens, so "
    "compare models in such a column, not one column with another."
)
_MOST_WITH_QUARTILES = 3  # measures
_PUBLISHED = " (published)"
_SPEED = "{}s/s: training, median step."
_BEST_RATE = (
    "learning rate: of the model's own grid by factors of 2 the one with the least loss on the "
    "validation half of what is held out; all else is of the test half."
)
_EDGE = " (edge)"
_AT_THE_EDGE = "(edge): the best of its grid is an end of it; a better one may lie beyond."


def comparison(rows: Sequence[Row]) -> Table:
    """A line a model; numbers are means over seeds.

    Where a paper published the same comparison, its figures stand in the last columns.
    """
    first, published = rows[0], PUBLISHED.get(rows[0]["recipe"])
    columns = [
        "model",
        "params (M)",
        "active (M)",
        "MFLOPs",
        "counted",
        "heads on",
        *(["learning rate"] if _searched(rows) else []),
        *(measure.column for measure in measures(first)),
        *(column for _, column in _on_the_way(first)),
        *([_speed_column(rows)] if _alone(rows) else []),
        *(f"{column}{_PUBLISHED}" for column in (published.columns if published else ())),
    ]
    quartiles = _with_quartiles(rows)
    cells: list[list[Cell]] = []
    for name in dict.fromkeys(row["model"] for row in rows):
        runs = [row for row in rows if row["model"] == name]
        cells.append([
            runs[0]["label"],
            _mean(runs, "parameters", "{:.2f}", 1e-6),
            _mean(runs, "active_parameters", "{:.2f}", 1e-6),
            _mean(runs, "flops", "{:.2f}", 1e-6),
            _mean(runs, "flops_counted", "{:.2f}", 1e-6),
            _mean(runs, "active_heads", "{:.0f} %", 100),
            *([_rate(runs[0])] if _searched(rows) else []),
            *(_value(runs, measure.key, quartiles) for measure in measures(first)),
            *(_value(runs, key, False) for key, _ in _on_the_way(first)),
            *([_mean(runs, "per_second", "{:,.0f}")] if _alone(rows) else []),
            *(published.of(name) if published else ()),
        ])  # fmt: skip
    training = f"{{steps}} steps, {int(first['seen']):,} {{unit}}s a model, seeds {{seeds}}"
    where = measured_on(rows, f"{{device}}, {{threads}} thread(s), {{precision}}; {training}")
    table = Table(columns, cells, measured_on=where)
    return replace(table, legend=_legend(rows, table))


def for_terminal(rows: Sequence[Row], title: str) -> rich.table.Table:
    """The comparison, narrow enough for 80 columns: published figures have a †."""
    table = comparison(rows)
    minor = [measure.column for measure in measures(rows[0]) if measure.minor]
    on_the_way = [column for _, column in _on_the_way(rows[0])]
    many = len(measures(rows[0])) > _MOST_WITH_QUARTILES
    crowded = bool(minor or on_the_way) or many or any(_PUBLISHED in x for x in table.columns)
    spare = ["active (M)", "counted", *minor, *on_the_way] if crowded else []
    spare += ["params (M)", "learning rate", _speed_column(rows)] if many and not minor else []
    left_out = [column for column in table.columns if column in spare]
    more = f" Not shown here: {', '.join(left_out)}; results.csv has them." if left_out else ""
    shown = table.without(left_out)
    narrow = replace(
        shown,
        columns=[x.replace(_PUBLISHED, "†") for x in shown.columns],
        legend=_legend(rows, shown).replace(_PUBLISHED.strip(), "†") + more,
    )
    return narrow.for_terminal(title, padding=0)


def _alone(rows: Sequence[Row]) -> bool:
    """Whether each model had the machine for itself; otherwise its speed says little."""
    return all(int(row["workers"]) == 1 for row in rows)


def _speed_column(rows: Sequence[Row]) -> str:
    """Head of the column of speeds."""
    return f"{rows[0]['unit']}s/s ↑"


def _legend(rows: Sequence[Row], table: Table) -> str:
    """What the table's columns are, and where published ones come from."""
    recipe = rows[0]["recipe"]
    counted = _COUNTED if "counted" in table.columns else ""
    sentences = [_measured(rows), _COST.format(rows[0]["unit"]) + counted + "."]
    if mistyped(rows[0]):
        sentences.insert(1, _TYPOS)
    if has_spread(table.rows):
        sentences.append(_OVER_SEEDS)
    if _speed_column(rows) in table.columns:
        sentences.append(_SPEED.format(rows[0]["unit"]))
    if "learning rate" in table.columns:
        sentences.append(_BEST_RATE)
        if any(_EDGE in str(cell) for line in table.rows for cell in line):
            sentences.append(_AT_THE_EDGE)
    if published := PUBLISHED.get(recipe):
        sentences.append(
            f"{_PUBLISHED.strip()}: {published.what}, by {published.source}; not measured here."
        )
    return " ".join(sentences)


def _measured(rows: Sequence[Row]) -> str:
    row = rows[0]
    recipe, blocks = row["recipe"], row.get("eval_blocks_per_file")
    if recipe in _MEASURED or blocks is None:
        amounts = [sentence for key, sentence in _SCORED.items() if key in row]
        counts = {key: int(row[key]) for key in ("samples", *_SCORED) if key in row}
        return " ".join([_MEASURED[recipe], *(x.format(**counts) for x in amounts)])
    quartiles = ", in brackets the quartiles of the files" if _with_quartiles(rows) else ""
    if domains := [key.removeprefix(_FILES) for key in row if key.startswith(_FILES)]:
        amounts = [_amount(row, domain) for domain in domains]
        text = f"held-out text: {'; '.join(amounts)}; of up to {blocks} blocks of a file"
    else:
        text = f"the held-out files, of up to {blocks} blocks of each"
    return f"PPL: perplexity of {text}{quartiles}."


def _amount(row: Row, domain: str) -> str:
    files, tokens = int(row[_FILES + domain]), int(row[f"scored_tokens_{domain}"])
    return f"{domain} {files:,} files, {tokens:,} tokens"


def _searched(rows: Sequence[Row]) -> bool:
    """Whether each model has a learning rate of its own."""
    return any(row.get("rates_tried") for row in rows)


def _rate(row: Row) -> Cell:
    """A model's learning rate, marked where the grid of those that were tried ends with it."""
    rate, tried = float(row["learning_rate"]), [float(x) for x in row["rates_tried"].split()]
    return f"{rate:g}" + ("" if min(tried) < rate < max(tried) else _EDGE)


def _on_the_way(row: Row) -> list[tuple[str, str]]:
    """Keys and columns of the measures after a part of the training, where a row has them."""
    keys = [(measure, early(measure.key)) for measure in measures(row)]
    return [
        (key, f"{measure.column[:-2]} after {row['early_steps']} steps {measure.column[-1]}")
        for measure, key in keys
        if row.get(key) not in (None, "")
    ]


def _mean(runs: Sequence[Row], key: str, form: str, scale: float = 1) -> Cell:
    return mean([float(r[key]) * scale for r in runs if r[key] not in ("", None)], form)


def _with_quartiles(rows: Sequence[Row]) -> bool:
    """Whether they are there, and the columns few enough to hold them."""
    return len(measures(rows[0])) <= _MOST_WITH_QUARTILES and any("_q1" in key for key in rows[0])


def _value(runs: Sequence[Row], key: str, with_quartiles: bool) -> Cell:
    values, note = [float(row[key]) for row in runs], ""
    if with_quartiles:
        low, high = (fmean(float(row[f"{key}_{q}"]) for row in runs) for q in ("q1", "q3"))
        note = f" ({low:.0f}–{high:.0f})"
    return mean(values, "{:.1f}" if min(values) >= 20 else "{:.2f}", note=note)
