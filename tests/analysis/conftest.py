from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from headwise.analysis.image_records import PatchMap, RoutedImage, SampleGrid, to_png
from headwise.analysis.permutation import Difference, GroupDifference, LayerDifference
from headwise.analysis.records import (
    Curve,
    ExpertLoads,
    HeadLoads,
    ModelRecord,
    RoutedText,
    RunRecord,
)
from headwise.results.table import Number, mean

HOSTILE = "<script>alert('&')</script>"


def different(groups, candidates, p_value):
    """A difference in which the last candidate of each layer stands out."""
    layers = [
        LayerDifference(
            0.02, 0.005, 0.05, p_value, [0.0] * (n - 1) + [12.5], [1.0] * (n - 1) + [p_value]
        )
        for n in candidates
    ]
    return GroupDifference(groups, 9999, Difference(0.04, 0.01, 0.1, p_value), layers)


def curve(end, steps=(10, 20, 30)):
    return Curve(list(steps), [end + 3, end + 1, end])


@pytest.fixture
def record():
    """Three variants, one of them with two seeds; two layers, one shared head and three routed."""
    heads = HeadLoads(
        [[0], [0]],
        {
            "code": [[1.0, 0.5, 0.25, 0.25], [1.0, 0.0, 0.5, 0.5]],
            "prose": [[1.0, 0.25, 0.5, 0.25], [1.0, 0.0, 0.5, 0.5]],
        },
        different({"code": 23, "prose": 7}, [4, 4], 0.0001),
    )
    experts = ExpertLoads(
        [1],
        {"code": [[0.5, 0.5, 0, 0, 0]], "prose": [[0.0, 0.5, 0.5, 0, 0]]},
        top_k=2,
        assignments={"code": [24], "prose": [12]},
        overlap={"code": [0.25], "prose": [0.75]},
        difference=different({"code": 23, "prose": 7}, [5], 0.3),
    )
    texts = [
        RoutedText("code", ["\t", HOSTILE, "x", "\n\n  "], [[[0, 1], [0, 2], [0, 3], [0, 2]]] * 2),
        RoutedText("prose", ["\x00", " naïve 蛇"], [[[0, 3], [0, 1]]] * 2),
    ]
    return RunRecord(
        title=f"Title {HOSTILE}",
        facts={"device": "CPU", "seeds": "0, 1 <both>"},
        table_columns=["Model", "loss (nats) ↓", "speed (tokens/s) ↑"],
        table_rows=[
            ["dense", mean([1.48, 1.52], "{:.2f}"), mean([1170, 1230], "{:,.0f}")],
            ["moh", Number(1.494, "{:.2f}"), Number(900)],
            ["moe", Number(1.9), "–"],
        ],
        notes=["Bold & brave."],
        models=[
            ModelRecord("dense", "Dense", 0, curve(1.4), curve(1.5)),
            ModelRecord("dense", "Dense", 1, curve(1.44), curve(1.54)),
            ModelRecord("moh", "MoH $x$", 0, curve(1.39), curve(1.49), heads, None, texts),
            ModelRecord("moe", "MoE", 0, curve(1.8), curve(1.9), None, experts),
        ],
        sample_model="moh",
        sample_prompt="Once\x1b",
        sample_text=" upon a\n<time>",
    )


@pytest.fixture
def pictures(record):
    """The record of models of images: two classes, one of them of a hostile name."""
    square = Image.fromarray(np.full((3, 3), 7, dtype=np.uint8))
    heads = HeadLoads([[0]], {"cat": [[1.0, 0.5]], HOSTILE: [[1.0, 0.0]]})
    images = [
        RoutedImage("cat", to_png(square), [PatchMap(0, [1, 2], [[0, 1], [0]])]),
        RoutedImage(HOSTILE, to_png(square), [PatchMap(0, [1, 2], [[0], [0]])]),
    ]
    model = ModelRecord(
        "moh", "MoH", 0, curve(1.39), curve(1.49), heads, images=images,
        samples=SampleGrid(["cat", HOSTILE], to_png(square)),
    )  # fmt: skip
    return replace(record, models=[record.models[0], model])
