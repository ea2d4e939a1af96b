"""The figure of a comparison, from its rows."""

from collections.abc import Sequence
from pathlib import Path

from headwise.analysis.plots import comparison
from headwise.recipes import table
from headwise.recipes.directory import write_whole
from headwise.recipes.studies import STUDIES


def draw_comparison(rows: Sequence[table.Row], path: Path) -> None:
    """Perplexity of every model and seed, a panel a domain; written beside, then renamed."""
    study = STUDIES.get(rows[0]["recipe"])
    panels = {
        domain: [(row["label"], _position(row), float(row[f"perplexity_{domain}"])) for row in rows]
        for domain in table.domains(rows[0])
    }
    figure = comparison(panels, axis=study.axis if study else None)
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=160))


def _position(row: table.Row) -> float | None:
    return None if row["position"] in (None, "") else float(row["position"])
