"""How models use their experts, and dense against routed heads in time: tables for people."""

import statistics
from collections.abc import Callable, Sequence

from headwise.analysis.experts import ExpertUse, expert_use
from headwise.analysis.records import RunRecord, Speed
from headwise.results.table import Cell, Number, Table, mean

EXPERT_LEGEND = [
    "Used: experts of a layer that got any work at all.",
    "Effective: so many equally busy experts are as evenly loaded (exp of the load's entropy).",
    "Busiest: share of the work that the busiest expert of a layer gets.",
    "Overlap: of the experts that a sub-token goes to, those that another sub-token of the token "
    "goes to as well; 100 % would be as if no token had been split, less than chance where first, "
    "second, … sub-tokens keep to experts of their own.",
    "Specialisation: how much the expert tells of the domain; 0 % where all domains load the "
    "experts alike, 100 % where no two share an expert.",
    "By chance: what choices at random at the same loads, and domains that do not differ, would "
    "come to.",
]
_COLUMNS: list[tuple[str, str, Callable[[ExpertUse], float | None]]] = [
    ("experts", "{:.4g}", lambda use: use.experts),
    ("used (%)", "{:.1f}", lambda use: 100 * use.used / use.experts),
    ("effective (%)", "{:.1f}", lambda use: 100 * use.effective / use.experts),
    ("busiest (%)", "{:.1f}", lambda use: 100 * use.largest),
    ("overlap (%)", "{:.1f}", lambda use: _percent(use.overlap)),
    ("by chance (%)", "{:.1f}", lambda use: _percent(use.overlap_by_chance)),
    ("specialisation (%)", "{:.2f}", lambda use: _percent(use.specialisation)),
    ("by chance (%)", "{:.2f}", lambda use: _percent(use.specialisation_by_chance)),
]


def expert_table(record: RunRecord) -> Table:
    """A row for each variant with experts, explained by `EXPERT_LEGEND`.

    A cell is the mean over layers and domains, ± its deviation over the runs of a variant: unlike
    the loads, these numbers do not depend on which expert is which.
    """
    rows: list[list[Cell]] = []
    for runs in record.variants().values():
        uses = [expert_use(run.experts) for run in runs if run.experts and run.experts.by_domain]
        if uses:
            cells = [
                _over_runs([[value(use) for use in run] for run in uses], form)
                for _, form, value in _COLUMNS
            ]
            rows.append([runs[0].label, *cells])
    return Table(["model", *(name for name, _, _ in _COLUMNS)], rows)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _over_runs(runs: Sequence[Sequence[float | None]], form: str) -> Cell:
    known = [[value for value in run if value is not None] for run in runs]
    return mean([statistics.fmean(run) for run in known if run], form)


def speed_table(speeds: Sequence[Speed]) -> Table:
    """A row for each step and context."""
    columns = ["", "dense (ms)", "MoH (ms)", "MoH / dense"]
    rows: list[list[Cell]] = [
        [_name(s), _in_ms(s.dense), _in_ms(s.routed), Number(s.ratio, "{:.2f}")] for s in speeds
    ]
    return Table(columns, rows)


def verdict(speeds: Sequence[Speed]) -> str:
    """In which cases routed heads take less time than the dense model, and in which they do not."""
    faster = [speed for speed in speeds if round(speed.ratio, 2) < 1]
    others = [speed for speed in speeds if speed not in faster]
    parts = {"MoH is faster": faster, "MoH is slower or equal": others}
    return " ".join(
        f"{what}: {', '.join(f'{_name(s)} ({s.ratio:.2f})' for s in part)}."
        for what, part in parts.items()
        if part
    )


def _name(speed: Speed) -> str:
    return f"{speed.step} at {speed.context:,} tokens"


def _in_ms(value: float) -> Number:
    return Number(value, "{:,.0f}" if value >= 100 else "{:.2f}")
