"""Every benchmark at toy size: its correctness gates pass and its rows are whole. No speed here."""

import csv
import time

import pytest

from headwise.bench import BENCHMARKS, BenchRun, bench
from headwise.bench.comparison import LARGEST_ERROR_RATIO, Comparison, Effort, Rival, measure
from headwise.hf.batching import IS_SUPPORTED
from headwise.training.timing import interleaved

# As small as they are, whole models take minutes, and experts half of one.
LONG = ("model", "experts")
WHICH = [pytest.param(x, marks=pytest.mark.long if x in LONG else ()) for x in BENCHMARKS]


@pytest.mark.parametrize("which", WHICH)
def test_every_comparison_is_correct(which, tmp_path):
    if which == "serve" and not IS_SUPPORTED:
        pytest.skip("transformers is too old for continuous batching of routed heads")
    rows = bench(BenchRun(which=which, device="cpu", rounds=1, output=tmp_path), toy=True)
    assert rows
    assert {row["rival"] for row in rows if not row["correct"]} == set()
    assert all(row["error_ratio"] <= LARGEST_ERROR_RATIO for row in rows)
    assert all(row["ratio"] > 0 for row in rows)
    with (tmp_path / "performance.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "performance.html").exists() == (which == "attention")


@pytest.mark.long
def test_scaling_is_correct_and_whole(tmp_path):
    rows = bench(BenchRun(which="scaling", device="cpu", rounds=1, output=tmp_path), toy=True)
    assert {row["rival"] for row in rows if not row["correct"]} == set()
    assert len({(row["case"], row["axis"], row["dtype"]) for row in rows}) == 12
    assert len(rows) == 24
    assert all(row["ours_ms"] > 0 and row["limit_ms"] > 0 for row in rows)
    assert None not in {row[name] for row in rows for name in ("ours_mib", "rival_mib")}
    assert None not in {row["ours_time_slope"] for row in rows}
    with (tmp_path / "scaling.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "scaling.png").exists()
    assert (tmp_path / "scaling.html").read_text().count("<table>") == 2


def test_no_speed_without_correctness():
    import torch

    right, wrong = torch.ones(3, dtype=torch.float64), torch.zeros(3)

    def never() -> None:
        raise AssertionError("a wrong result was timed")

    comparison = Comparison(
        "core", "T=3", torch.float32, 0.5, never, {"SDPA": Rival(never)},
        lambda: ([wrong], [right.float()], [right]),
    )  # fmt: skip
    effort = Effort(torch.device("cpu"), rounds=1, seconds=0.0, warmups=0, quick=True)
    (row,) = measure(comparison, effort)
    assert not row["correct"]
    assert row["ours_ms"] is None
    assert row["ratio"] is None


@pytest.mark.parametrize(("rounds", "seconds", "least"), [(5, 0.0, 5), (1, 0.05, 2)])
def test_rounds_and_seconds_are_least_ones(rounds, seconds, least):
    import torch

    turns = []
    candidates = {name: lambda name=name: (time.sleep(0.01), turns.append(name)) for name in "ab"}
    times = interleaved(
        candidates, rounds=rounds, seconds=seconds, warmups=1, device=torch.device("cpu")
    )
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert least <= len(turns) // 2 - 1 <= 5
    assert list(times) == ["a", "b"]
    assert min(times.values()) >= 10
