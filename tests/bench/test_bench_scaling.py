"""How cost grows: slopes, where a series ends, what is marked."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from headwise.analysis.plots import cost_against_size
from headwise.bench import scaling, scaling_table
from headwise.bench.comparison import Comparison, Effort, Rival
from headwise.bench.machine import Machine, Work
from headwise.bench.scaling import Point, Series, slope, with_slopes
from headwise.results.rows import environment, read_csv, write_csv

EFFORT = Effort(torch.device("cpu"), rounds=1, seconds=0.0, warmups=0, quick=False, toy=True)
MACHINE = Machine(1e9, dict.fromkeys(scaling.DTYPES, 1e9), memory=1e12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0, 6.0, 8.0, 16.0], 1.0),
        ([9.0, 9.0, 2.0, 8.0, 32.0], 2.0),  # of five the last three
        ([3.0, 6.0], 1.0),
        ([3.0, None], None),
        ([3.0], None),
        ([0.5, 0.5, 0.5], None),  # too little to be told from noise
    ],
)
def test_slopes_are_of_the_larger_half(values, expected):
    points = [(2**i, value) for i, value in enumerate(values)]
    found = slope(points, least=1.0)
    assert found == (None if expected is None else pytest.approx(expected))


def rows_of(ours, theirs, memory=(10.0, 20.0)):
    """A series of doubling sizes."""
    common = {"benchmark": "scaling", "axis": "tokens", "case": "a layer", "dtype": "float32"}
    common |= {"rival": "dense", "shape": "T=…", "correct": True, "error_ratio": 1.0}
    rows = [
        common
        | {"size": 512 << i, "ours_ms": a, "rival_ms": b, "limit_ms": 0.5, "kept_mib": None}
        | {"ours_mib": memory[0] * 2**i, "rival_mib": memory[1] * 2**i}
        | environment("", cuda=False)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    return with_slopes(rows)


def test_a_slope_worse_than_the_rivals_is_marked_as_a_defect(tmp_path):
    worse, noisy = rows_of([1.0, 4.0], [3.0, 6.0]), rows_of([1.0, 2.06], [3.0, 6.0])
    assert scaling_table.is_defect(worse[0], "time")
    assert not scaling_table.is_defect(noisy[0], "time")
    assert not scaling_table.is_defect(worse[0], "memory")
    time, memory = scaling_table.slopes(worse).printed()
    assert time[3] == "tokens 512 to 1,024"
    assert time[-5:] == ["4", "6", "0.5", "2.00 ✗", "1.00"]
    assert memory[-5:] == ["20", "40", "", "1.00", "1.00"]
    write_csv(tmp_path / "a.csv", worse)
    read = read_csv(tmp_path / "a.csv")
    assert scaling_table.slopes(read).markdown() == scaling_table.slopes(worse).markdown()
    assert scaling_table.page(read, "<svg></svg>") == scaling_table.page(worse, "<svg></svg>")


def test_a_defect_of_one_series_is_not_one_of_another():
    other = [row | {"case": "another"} for row in rows_of([1.0, 2.0], [3.0, 6.0])]
    rows = with_slopes([*rows_of([1.0, 4.0], [3.0, 6.0]), *other])
    assert [scaling_table.is_defect(row, "time") for row in rows] == [True, True, False, False]


def test_wrong_results_have_no_times_in_the_page():
    (row,) = rows_of([None], [None])
    row |= {"correct": False, "error_ratio": 31.0, "ours_mib": None, "rival_mib": None}
    assert scaling_table.slopes([row]).rows == []
    assert "wrong result, error ×31.0" in scaling_table.page([row], "")


def fake(sizes, keeps=lambda n: 0, degree=1):
    x = torch.ones(3)

    def build(effort, dtype, size):
        same = [x.double()]
        comparison = Comparison(
            "a", f"{size}", dtype, 1.0, x.sum, {"b": Rival(x.sum)}, lambda: (same, same, same)
        )
        return Point(comparison, Work(1.0, 2e6 * size))

    return Series("tokens", sizes, build, keeps, degree)


def timed(series):
    console = Console(file=io.StringIO(), width=200)
    shown = scaling._timed(EFFORT, MACHINE, "fake", series, torch.float32, console)
    return list(shown), console.file.getvalue()


def test_a_series_ends_where_time_or_memory_do(monkeypatch):
    whole, said = timed(fake((1, 2, 4)))
    assert [size for size, _ in whole] == [1, 2, 4]
    assert [row["limit_ms"] for _, row in whole] == [2.0, 4.0, 8.0]
    assert said == ""
    some, said = timed(fake((1, 2, 4), keeps=lambda n: 0 if n < 4 else 2**60))
    assert [size for size, _ in some] == [1, 2]
    assert "fake, float32: ends before 4: it would keep" in said
    monkeypatch.setattr(scaling, "_LONGEST_MS", 0.0)
    first, said = timed(fake((1, 2, 4)))
    assert [size for size, _ in first] == [1]
    assert "fake, float32: ends before 2: a round would take" in said


def test_the_sizes_are_those_that_are_promised():
    series = scaling.all_series(replace(EFFORT, toy=False))
    ends = {name: (each.sizes[0], each.sizes[-1]) for name, each in series.items()}
    assert ends == {
        "layer, tokens": (1024, 131072),
        "layer, heads": (8, 128),
        "layer, batch": (1, 32),
        "token, context": (1024, 131072),
        "token, batch": (1, 32),
        "experts": (8, 1024),
    }


def test_the_chart_has_time_and_memory_of_each_series():
    rows = rows_of([1.0, 4.0], [3.0, 6.0])
    rows += [row | {"case": "another", "ours_mib": "", "rival_mib": None} for row in rows]
    figure = cost_against_size(rows)
    figure.draw_without_rendering()
    assert len(figure.axes) == 4
    assert {axes.get_ylabel() for axes in figure.axes} == {"time (ms)", "memory (MiB)"}
    ours = figure.axes[0].lines[0]
    assert ours.get_label() == "ours, float32"
    assert list(ours.get_ydata()) == [1.0, 4.0]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["512", "1k"]
