"""How much of the original a tuned model recovers: as data, as a table, as a figure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headwise.hf.auto import Routed
from headwise.hf.surgery import attention_modules
from headwise.progress import plain_console
from headwise.results.files import write_whole
from headwise.results.rows import NO_ROUTER, Row, measured_on, router_label, write_csv
from headwise.results.table import Cell, Number, Table, has_spread, mean

_LEGEND = (
    "PPL: perplexity of held-out text; the original's is {}. Recovered: the original's perplexity "
    "over the model's."
)
_TO_DENSE = " To dense: the model's perplexity over that of the original tuned with every head on."
_OVER_SEEDS = " ±: deviation over seeds."


class Point(NamedTuple):
    """An evaluation: of which model, after how much training."""

    stage: str
    router: str
    shared_heads: float
    active_heads: float
    step: int
    tokens: int
    perplexity: float
    recovery: float
    original_perplexity: float
    tokens_per_second: int | None


def points(stage: str, model: Any, trainer: Any, *, tokens_before: int) -> list[Point]:
    """The evaluations of a stage, by step; shares of heads are means over the layers.

    `trainer` is the `RecoveringTrainer` that trained it.
    """
    router, shared, active = _heads(model)
    evaluations = {int(x["step"]): x for x in trainer.state.log_history if "eval_loss" in x}
    return [
        Point(
            stage, router, shared, active, step, tokens_before + step * trainer.speed.per_step,
            round(x["eval_perplexity"], 4), round(x["eval_recovery"], 2),
            round(math.exp(trainer.original_loss), 4),
            trainer.speed.rounded(),
        )
        for step, x in sorted(evaluations.items())
    ]  # fmt: skip


def _heads(model: Any) -> tuple[str, float, float]:
    """The router, and the shares of heads that are shared and on; "none" with every head on."""
    if not isinstance(model, Routed) or model.conversion.attention is None:
        return NO_ROUTER, 1.0, 1.0
    modules: list[Any] = list(attention_modules(model).values())
    budgets = [module.router.budget for module in modules if hasattr(module, "router")]
    shared = [budget.shared_heads / budget.num_heads for budget in budgets]
    active = statistics.fmean(budget.active_share for budget in budgets)
    router = NO_ROUTER if active == 1 else model.conversion.attention.router
    return router, statistics.fmean(shared), active


def report(rows: Sequence[Row], output: Path, models: Mapping[str, Path]) -> None:
    """Write results.csv and recovery.png; print the table and where the stages' models lie."""
    from headwise.analysis.plots import recovery_curves

    write_csv(output / "results.csv", rows)
    figure, curve = recovery_curves(rows), output / "recovery.png"
    write_whole(curve, lambda partial: figure.savefig(partial, format="png", dpi=150))
    plain_console().print(comparison(rows).for_terminal())
    for stage, directory in models.items():
        print(f"{stage}: {directory}")
    print(f"curve: {curve}")


def comparison(rows: Sequence[Row]) -> Table:
    """A line for each share of heads and router, most heads first; values over seeds."""
    columns = [
        "heads on", "router", "shared", "tuned on", "PPL before", "PPL after ↓", "recovered ↑",
    ]  # fmt: skip
    found = ends(rows)
    dense = next((last for kind, (_, last) in found.items() if kind.router == NO_ROUTER), None)
    lines: list[list[Cell]] = []
    for kind, (first, last) in sorted(found.items(), key=lambda item: -item[0].active):
        lines.append([
            f"{100 * kind.active:.4g} %",
            router_label(kind.router),
            Number(100 * float(last[0]["shared_heads"]), "{:.3g} %"),
            Number(int(last[0]["tokens"]), "{:,}"),
            _mean(first, "perplexity", "{:.2f}"),
            _mean(last, "perplexity", "{:.3f}"),
            _mean(last, "recovery", "{:.1f} %"),
            *([] if dense is None else [Number(_mean_of(last) / _mean_of(dense), "{:.3f}")]),
        ])  # fmt: skip
    legend = _LEGEND.format(rows[-1]["original_perplexity"])
    legend += "" if dense is None else _TO_DENSE
    legend += _OVER_SEEDS if has_spread(lines) else ""
    where = measured_on(rows, "{device}, {threads} thread(s), {precision}; seeds {seeds}")
    return Table(columns + ([] if dense is None else ["to dense ↓"]), lines, legend, where)


class Kind(NamedTuple):
    """What the lines of a table tell apart."""

    stage: str
    router: str
    active: float


def ends(rows: Sequence[Row]) -> dict[Kind, tuple[list[Row], list[Row]]]:
    """Of each kind the first and the last evaluation of each seed."""
    evaluations: dict[Kind, dict[int, list[Row]]] = {}
    for row in rows:
        kind = Kind(row["stage"], row["router"], float(row["active_heads"]))
        evaluations.setdefault(kind, {}).setdefault(int(row["step"]), []).append(row)
    return {kind: (by[min(by)], by[max(by)]) for kind, by in evaluations.items()}


def _mean_of(rows: Sequence[Row]) -> float:
    return statistics.fmean(float(row["perplexity"]) for row in rows)


def _mean(rows: Sequence[Row], key: str, form: str) -> Cell:
    return mean([float(row[key]) for row in rows], form, "{:.2g}")
