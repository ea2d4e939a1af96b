"""Dense against routed heads in time: a table and what it says."""

from collections.abc import Sequence

from headwise.analysis.records import Speed
from headwise.results.table import Cell, Number, Table


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
