"""What a run left: the rows of its table, the losses of its models, their weights."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from headwise.results.rows import Row, read_csv


def rows_but(run: Path, measured: Sequence[str]) -> list[Row]:
    """Without the columns that two equal runs differ in."""
    rows = read_csv(run / "results.csv")
    return [{name: x for name, x in row.items() if name not in measured} for row in rows]


def losses(run: Path) -> list[list[float]]:
    """Of each model in training."""
    models = json.loads((run / "record.json").read_text())["models"]
    return [model["training"]["losses"] for model in models]


def weights(run: Path, name: str) -> dict[str, Tensor]:
    return load_file(run / "models" / name / "model.safetensors")
