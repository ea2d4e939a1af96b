"""The figures of a comparison: of its rows, and of the heads and the drawings of image models."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headwise.analysis import plots
from headwise.analysis.records import ModelRecord, RunRecord
from headwise.analysis.summary import representatives
from headwise.results.files import write_whole
from headwise.results.rows import Row
from headwise.training.measures import measures


def draw_comparison(rows: Sequence[Row], path: Path, *, axis: str | None) -> None:
    """What every model and seed came to, a panel a main measure; written beside, then renamed.

    `axis` is what the position of a row is; None where the models stand on no axis.
    """
    panels = [
        plots.Panel(
            measure.subject,
            measure.quantity,
            [_point(row, measure.key) for row in rows],
        )
        for measure in measures(rows[0])
        if not measure.minor
    ]
    _save(plots.comparison(panels, axis=axis), path)


def draw_pictures(record: RunRecord, directory: Path) -> list[Path]:
    """Of the first seed of each image model what the page shows of it, as PNG files.

    NAME-last-layer.png and NAME-all-layers.png are how often heads are on for each class,
    NAME-patches-LAYER.png for which patches, and NAME-samples.png is what the model drew.

    Returns:
        The files; none for models of text.
    """
    written = []
    for model in representatives(record):
        for name, figure in _head_figures(model):
            written.append(directory / f"{model.name}-{name}.png")
            _save(figure, written[-1])
        if model.samples:
            written.append(directory / f"{model.name}-samples.png")
            _write_png(model.samples.png, written[-1])
    return written


def _head_figures(model: ModelRecord) -> list[tuple[str, Any]]:
    heads, images = model.heads, model.images
    if heads is None or not images:
        return []
    return [
        ("last-layer", plots.head_load_map(heads, plots.last_routed_layer(heads))),
        ("all-layers", plots.head_load_map(heads)),
        *(
            (f"patches-{patches.layer}", plots.patch_maps(images, i, heads))
            for i, patches in enumerate(images[0].maps)
        ),
    ]


def _write_png(text: str, path: Path) -> None:
    write_whole(path, lambda partial: partial.write_bytes(base64.b64decode(text)))


def _save(figure: Any, path: Path) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=160))


def _point(row: Row, key: str) -> plots.Point:
    position = None if row["position"] in (None, "") else float(row["position"])
    return plots.Point(row["label"], position, float(row[key]), row.get("series") or "")
