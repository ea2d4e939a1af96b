"""Scores side by side, by hand."""

import pytest

from headwise.commands.eval.table import comparison


def row(model: str, task: str, value: float, error: float | str, **changes: str) -> dict:
    common = {
        "group": "", "metric": "acc", "documents": 7, "device": "abacus", "precision": "fp32",
        "lm_eval": "1", "torch": "2", "transformers": "5", "python": "3",
    }  # fmt: skip
    score = {"model": model, "task": task, "value": value, "standard_error": error}
    return common | score | changes


ROWS = [
    row("a/dense", "one", 0.5, 0.03), row("a/dense", "two", 0.7, 0.04),
    row("b/run/models/routed-seed0", "one", 0.4, 0.06),
    row("b/run/models/routed-seed0", "two", 0.6, 0.08),
]  # fmt: skip


def test_a_line_a_task_and_their_mean():
    table = comparison(ROWS)
    assert table.columns == ["task", "metric", "n", "dense", "run/routed-seed0"]
    assert table.printed() == [
        ["one", "acc", "7", "0.500 ±0.030", "0.400 ±0.060"],
        ["two", "acc", "7", "0.700 ±0.040", "0.600 ±0.080"],
        ["mean", "acc", "", "0.600 ±0.025", "0.500 ±0.050"],
    ]


def test_parts_of_a_group_are_left_out_and_an_error_may_be_missing():
    rows = [row("a", "all", 0.5, ""), row("a", "part", 0.5, 0.1, group="all")]
    assert comparison(rows).printed() == [["all", "acc", "7", "0.500"]]
    legends = [comparison(x).legend for x in (rows, ROWS)]
    assert ["±" in legend for legend in legends] == [False, True]
    assert ["mean" in legend for legend in legends] == [False, True]


@pytest.mark.parametrize("second", ["b/dense", "dense"])
def test_models_of_one_name_keep_their_paths(second):
    table = comparison([row("a/dense", "one", 0.5, 0.1), row(second, "one", 0.5, 0.1)])
    assert table.columns[-2:] == ["a/dense", second]


def test_the_text_says_what_it_was_measured_on():
    assert "Measured on abacus, fp32; lm_eval 1, torch 2" in comparison(ROWS).markdown()
