"""Results as data: rows of a CSV file, and what they were measured on."""

import csv
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from headwise.errors import reading
from headwise.results.files import write_whole

Row = dict[str, Any]

# The router in rows of models that have every head on.
NO_ROUTER = "none"


def router_label(router: str) -> str:
    """What people call the router of a row."""
    return "every head" if router == NO_ROUTER else router.replace("_", " ")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write beside, then rename."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote; every value is text."""
    with reading(path, "a table"), path.open(newline="") as file:
        return list(csv.DictReader(file))


def environment(precision: str, *, cuda: bool | None = None) -> Row:
    """Device and versions, which stand in each row beside the figures.

    Args:
        precision: That of the figures.
        cuda: Whether a GPU was measured. Default: whether there is one.
    """
    return {
        "device": device_name(cuda=torch.cuda.is_available() if cuda is None else cuda),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "headwise")},
    }


def device_name(*, cuda: bool) -> str:
    """The GPU's name, or the processor's."""
    if cuda:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def measured_on(
    rows: Sequence[Row],
    form: str = "{device}, {threads} thread(s), {precision}",
    versions: Sequence[str] = ("torch", "transformers", "python"),
) -> str:
    """What rows were measured on, in words.

    Example: "AMD EPYC, 2 thread(s), fp32; seeds 0, 1; torch 2.13.0, python 3.11.7"

    Args:
        rows: All of them measured alike, but for the seeds.
        form: Names in braces stand for what the first row holds, {seeds} for all seeds.
        versions: Of which packages the versions are named, where the rows have them.
    """
    first = rows[0]
    seeds = ", ".join(dict.fromkeys(str(row.get("seed")) for row in rows))
    named = ", ".join(f"{name} {first[name]}" for name in versions if name in first)
    return f"{form.format(**first, seeds=seeds)}; {named}"
