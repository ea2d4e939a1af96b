"""How much of the original a tuned model recovers: as data, as a table, as a figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headwise.analysis.spread import with_spread
from headwise.hf.auto import Routed
from headwise.hf.distillation import RecoveringTrainer
from headwise.hf.surgery import attention_modules
from headwise.progress import plain_console
from headwise.recipes.directory import RunDirectory
from headwise.recipes.results import environment
from headwise.recipes.table import Row, in_markdown, write_csv
from headwise.recipes.tuning import TuningRun

LEGEND = "PPL: perplexity of held-out text. Recovered: the original's perplexity over the model's."
_OVER_RUNS = (
    "To dense: the model's perplexity over that of the original tuned with every head on. ±: "
    "deviation over seeds."
)


class Point(NamedTuple):
    """An evaluation: of which model, after how much training."""

    stage: str
    shared_heads: float
    active_heads: float
    step: int
    tokens: int
    perplexity: float
    recovery: float
    original_perplexity: float
    tokens_per_second: int | None


def points(run: TuningRun, stage: str, model: Any, trainer: RecoveringTrainer) -> list[Point]:
    """The evaluations of a stage, by step; shares of heads are means over the layers."""
    shared, active = _shares(model)
    per_step = run.batch_size * run.sequence_length
    before = run.dense.steps * per_step if stage == "routed" else 0
    evaluations = {int(x["step"]): x for x in trainer.state.log_history if "eval_loss" in x}
    return [
        Point(
            stage, shared, active, step, before + step * per_step,
            round(x["eval_perplexity"], 4), round(x["eval_recovery"], 2),
            round(math.exp(trainer.original_loss), 4),
            trainer.speed.rounded(),
        )
        for step, x in sorted(evaluations.items())
    ]  # fmt: skip


def _shares(model: Any) -> tuple[float, float]:
    if not isinstance(model, Routed):
        return 1.0, 1.0
    modules: list[Any] = list(attention_modules(model).values())
    budgets = [module.router.budget for module in modules if hasattr(module, "router")]
    shared = [budget.shared_heads / budget.num_heads for budget in budgets]
    return statistics.fmean(shared), statistics.fmean(b.active_share for b in budgets)


def report(run: TuningRun, evaluations: Sequence[Point]) -> None:
    """Write results.csv and recovery.png, and print the table."""
    from headwise.analysis.plots import recovery_curves

    rows: list[Row] = [
        {
            "model": Path(run.path).name,
            "seed": run.seed,
            "distill": run.distill if point.stage == "routed" else 0.0,
            **point._asdict(),
            **environment(run.precision),
        }
        for point in evaluations
    ]
    write_csv(run.output / "results.csv", rows)
    recovery_curves(rows).savefig(run.output / "recovery.png", dpi=150)
    columns, cells = comparison(rows)
    table = Table(*columns, box=SIMPLE_HEAD, caption=LEGEND)
    for line in cells:
        table.add_row(*line)
    plain_console().print(table)
    for stage in dict.fromkeys(point.stage for point in evaluations):
        print(f"{stage}: {RunDirectory(run.output).model(stage, run.seed)}")
    print(f"curve: {run.output / 'recovery.png'}")


def comparison(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A line for each share of heads, most first; values over seeds: see `LEGEND`."""
    columns = ["heads on", "shared", "tuned on", "PPL before", "PPL after ↓", "recovered ↑"]
    ends = {key: _ends(rows, key) for key in dict.fromkeys(map(_kind, rows))}
    dense = next((last for (stage, _), (_, last) in ends.items() if stage == "dense"), None)
    cells = []
    for (stage, active), (first, last) in sorted(ends.items(), key=lambda item: -item[0][1]):
        cells.append([
            f"{100 * active:.4g} %" + (", tuned dense" if stage == "dense" else ""),
            f"{100 * float(last[0]['shared_heads']):.3g} %",
            f"{int(last[0]['tokens']):,}",
            _mean(first, "perplexity", "{:.2f}"),
            _mean(last, "perplexity", "{:.3f}"),
            _mean(last, "recovery", "{:.1f} %"),
            *([] if dense is None else [f"{_mean_of(last) / _mean_of(dense):.3f}"]),
        ])  # fmt: skip
    return columns + ([] if dense is None else ["to dense ↓"]), cells


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table, its legend, and what it was measured on."""
    columns, cells = comparison(rows)
    table = in_markdown(columns, cells)
    row = rows[-1]
    legend = f"{LEGEND} {_OVER_RUNS} The original's perplexity is {row['original_perplexity']}."
    seeds = ", ".join(dict.fromkeys(str(r["seed"]) for r in rows))
    versions = ", ".join(f"{k} {row[k]}" for k in ("torch", "transformers", "python"))
    return (
        f"{table}\n\n{legend}\n"
        f"Measured on {row['device']}, {row['threads']} thread(s), {row['precision']}; seeds "
        f"{seeds}; {versions}.\n"
    )


def _kind(row: Row) -> tuple[str, float]:
    return row["stage"], float(row["active_heads"])


def _ends(rows: Sequence[Row], kind: tuple[str, float]) -> tuple[list[Row], list[Row]]:
    """The first and the last evaluation of each seed."""
    chosen = [row for row in rows if _kind(row) == kind]
    first, last = (end(int(row["step"]) for row in chosen) for end in (min, max))
    return (
        [row for row in chosen if int(row["step"]) == first],
        [row for row in chosen if int(row["step"]) == last],
    )


def _mean_of(rows: Sequence[Row]) -> float:
    return statistics.fmean(float(row["perplexity"]) for row in rows)


def _mean(rows: Sequence[Row], key: str, form: str) -> str:
    return with_spread([float(row[key]) for row in rows], form, "{:.2g}")
