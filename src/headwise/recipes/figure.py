"""The figure of a comparison, from its rows."""

from collections.abc import Sequence
from pathlib import Path

from headwise.analysis.plots import Panel, comparison
from headwise.recipes import table
from headwise.recipes.directory import write_whole
from headwise.recipes.measures import measures
from headwise.recipes.studies import STUDIES


def draw_comparison(rows: Sequence[table.Row], path: Path) -> None:
    """What every model and seed came to, a panel a main measure; written beside, then renamed."""
    study = STUDIES.get(rows[0]["recipe"])
    panels = [
        Panel(
            measure.subject,
            measure.quantity,
            [(row["label"], _position(row), float(row[measure.key])) for row in rows],
        )
        for measure in measures(rows[0])
        if not measure.minor
    ]
    figure = comparison(panels, axis=study.axis if study else None)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=160))


def _position(row: table.Row) -> float | None:
    return None if row["position"] in (None, "") else float(row["position"])
