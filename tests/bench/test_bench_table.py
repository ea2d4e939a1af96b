"""Rows as tables: older files, limits, and what README.md shows."""

from pathlib import Path
from runpy import run_path

import pytest

from headwise.bench import table
from headwise.results.rows import environment

COSTS = run_path(str(Path(__file__).parents[2] / "docs" / "tables.py"))["costs"]
LIMITS = ["of limit", "rival's of limit"]


def row(case="prompt", shape="B=1, T=4096, Llama", *, benchmark="model", ratio=0.8, **more):
    return {
        "benchmark": benchmark, "case": case, "shape": shape, "dtype": "float32", "share": 0.5,
        "rival": "dense model", "ours_ms": 8.0, "rival_ms": 10.0, "ratio": ratio, "ideal": 0.7,
        "share_of_ideal": 0.875, "target": None, "error_ratio": 1.0, "correct": True,
        **environment("", cuda=False), **more,
    }  # fmt: skip


def test_files_without_limits_make_tables_without_them():
    shown = table.performance([row()])
    assert not set(LIMITS) & set(shown.columns)
    assert "Limit" not in shown.legend
    limits = {"limit_ms": 4.0, "rival_limit_ms": 5.0, "of_limit": 0.5, "rival_of_limit": 0.25}
    mixed = table.performance([row(), row(**limits)])
    at = [mixed.columns.index(name) for name in LIMITS]
    assert [[line[i] for i in at] for line in mixed.printed()] == [["", ""], ["50%", "25%"]]
    assert "Limit" in mixed.legend


def test_the_terminal_has_no_empty_columns():
    shown = table.for_terminal([row(of_limit=0.5, rival_of_limit=0.25)])
    heads = [column.header for column in shown.columns]
    assert heads == ["case", "rival", "ours", "rival's", "ratio", "of ideal", *LIMITS]
    wrong = row(correct=False, ours_ms=None, rival_ms=None, ratio=None, error_ratio=9.0)
    assert "target" in [column.header for column in table.for_terminal([wrong]).columns]


def test_readmes_table_begins_with_whole_models_losing_ones_included():
    core = row("core, causal", "T=4096, 12×64", benchmark="attention", rival="SDPA")
    groups = "next token, whole key groups"
    rows = [
        core,
        row("MoH layer, causal", "T=2048", benchmark="layer", rival="dense layer"),
        row("next token", "B=1, S=1024, Llama"),
        row("next token", "B=8, S=4096, Llama"),
        row("next token", "B=8, S=1024, Llama"),
        row("next token", "B=32, S=1024, Llama", ratio=1.2),
        row("next token", "B=32, S=1024, Llama", dtype="bfloat16"),
        row(groups, "B=1, S=4096, Llama"),
        row(groups, "B=1, S=1024, Llama", ratio=1.1),
        row("prompt", "B=1, T=2048, Llama", share=0.75, ratio=1.3),
        row("prompt", "B=1, T=1024, Llama", share=0.75),
    ]
    shown = [tuple(line) for line in COSTS(rows).printed()]
    assert shown == [
        ("next token", "B=1, S=1024, Llama", "dense model", "0.80", ""),
        ("next token", "B=8, S=4096, Llama", "dense model", "0.80", ""),
        ("next token", "B=32, S=1024, Llama", "dense model", "1.20", "0.80"),
        (groups, "B=1, S=1024, Llama", "dense model", "1.10", ""),
        ("prompt, 75% of heads on", "B=1, T=2048, Llama", "dense model", "1.30", ""),
        ("MoH layer, causal", "T=2048", "dense layer", "0.80", ""),
        ("core, causal", "T=4096, 12×64", "SDPA", "0.80", ""),
    ]


@pytest.mark.parametrize("name", ["performance", "performance_amx", "gpu"])
def test_files_of_earlier_versions_are_tables_still(name):
    read = run_path(str(Path(__file__).parents[2] / "docs" / "tables.py"))["rows_of"](name)
    for make in (table.performance, table.summary, table.on_a_gpu):
        assert make(read).markdown().count("\n") > 5
    assert len(table.for_terminal(read).rows) == len(read)
    assert "<table>" in table.page(read, "<svg></svg>")
