"""Write the tables of README.md and docs/ again, and figures of results/, from results/*.csv."""

from collections.abc import Sequence
from pathlib import Path

from headwise.analysis.plots import cost_against_size, recovery_curves, time_against_share
from headwise.bench import scaling_table
from headwise.bench import table as bench
from headwise.commands.eval import table as evaluation
from headwise.recipes import recovery
from headwise.recipes.studies import STUDIES
from headwise.results.rows import Row, read_csv
from headwise.results.table import Table
from headwise.training import table as training
from headwise.training.figure import draw_comparison

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/convert.md", "docs/experiments.md", "docs/speed.md", "docs/vision.md")
# README.md shows whole models before layers, and these before the attention core alone.
MODELS_FIRST = ("model", "layer", "experts", "vision", "attention")
RIVALS = (
    "dense model", "dense layer", "dense twin", "released MoH", "sparse MoE", "SDPA",
    "FlexAttention",
)  # fmt: skip


def costs(rows: Sequence[Row]) -> Table:
    """README.md's table: what a user has against what headwise puts in its place.

    Parts of our own layers, and options, are in docs/speed.md. Of whole models every line that
    loses is here.
    """
    lost = bench.lost_lines(rows)
    shown = [
        row
        for row in rows
        if row["benchmark"] in MODELS_FIRST
        and row["rival"].startswith(RIVALS)
        and (bench.line_of(row) in lost or is_plain(row))
    ]
    return bench.summary(sorted(shown, key=lambda row: MODELS_FIRST.index(row["benchmark"])))


def is_plain(row: Row) -> bool:
    """Whether a row is of no option; of several texts at once, one length stands for all."""
    batch = row["shape"].partition(",")[0] if row["benchmark"] == "model" else ""
    several = batch.startswith("B=") and batch != "B=1"
    return "whole key groups" not in row["case"] and not (several and "=4096" not in row["shape"])


# Tables whose rows are in a file of another name.
SOURCES = {"costs": "performance", "speed": "performance", "speed-amx": "performance_amx"}
TABLES = {
    "costs": costs,
    "performance": bench.performance,
    "speed": bench.summary,
    "speed-amx": bench.summary,
    "gpu": bench.on_a_gpu,
    "scaling": scaling_table.slopes,
    "stories260k": recovery.comparison,
    "smollm2": evaluation.comparison,
} | dict.fromkeys(("lm", "vit", "vit-cifar10", "dit", *STUDIES), training.comparison)


def main() -> None:
    """Replace what stands between the marks of each table."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        for name, table_of in TABLES.items():
            start, end = f"<!-- table:{name} -->\n", "<!-- /table -->"
            before, found, rest = text.partition(start)
            if found and (ROOT / "results" / f"{SOURCES.get(name, name)}.csv").exists():
                _, _, after = rest.partition(end)
                rows = rows_of(SOURCES.get(name, name))
                text = f"{before}{start}{table_of(rows).markdown()}{end}{after}"
        (ROOT / page).write_text(text)
    figure = recovery_curves(rows_of("stories260k"))
    figure.savefig(ROOT / "results" / "stories260k.png", dpi=150)
    figure = time_against_share(rows_of("performance"))
    figure.savefig(ROOT / "results" / "performance.png", dpi=150)
    if (ROOT / "results" / "scaling.csv").exists():
        figure = cost_against_size(rows_of("scaling"))
        figure.savefig(ROOT / "results" / "scaling.png", dpi=150)
    for name, study in STUDIES.items():
        if (ROOT / "results" / f"{name}.csv").exists():
            path = ROOT / "results" / f"{name}.png"
            draw_comparison(rows_of(name), path, axis=study.axis)


def rows_of(name: str) -> list[Row]:
    """The rows of results/NAME.csv."""
    return read_csv(ROOT / "results" / f"{name}.csv")


if __name__ == "__main__":
    main()
