"""The recovery table, by hand."""

import pytest
from matplotlib.figure import Figure

from headwise.analysis.plots import recovery_curves
from headwise.recipes.recovery import comparison, report

COMMON = {
    "shared_heads": "0.5", "original_perplexity": "3.0", "device": "abacus", "threads": "1",
    "precision": "fp32", "torch": "2", "transformers": "5", "python": "3",
}  # fmt: skip


def row(stage: str, active: str, seed: int, step: int, perplexity: float) -> dict[str, str]:
    numbers = {"seed": seed, "step": step, "tokens": 64 * step, "perplexity": perplexity}
    numbers["recovery"] = round(100 * 3 / perplexity, 2)
    router = "none" if active == "1.0" else "fitted"
    kind = {"stage": stage, "router": router, "active_heads": active}
    return kind | {name: str(x) for name, x in numbers.items()} | COMMON


ROWS = [
    row("routed", "0.75", 0, 0, 6.0), row("routed", "0.75", 0, 10, 4.0),
    row("routed", "0.75", 1, 0, 6.0), row("routed", "0.75", 1, 10, 5.0),
]  # fmt: skip
DENSE = [row("dense", "1.0", 0, 0, 3.0), row("dense", "1.0", 0, 10, 3.6)]


def test_means_and_deviations_over_seeds():
    table = comparison(ROWS)
    assert table.columns[-1] == "recovered ↑"
    assert table.printed() == [
        ["75 %", "fitted", "50 %", "640", "6.00", "4.500 ± 0.71", "67.5 % ± 11"]
    ]


def test_compared_with_the_dense_model_tuned_alike():
    table = comparison(ROWS + DENSE)
    dense, routed = table.printed()
    assert table.columns[-1] == "to dense ↓"
    assert dense[:6] == ["100 %", "every head", "50 %", "640", "3.00", "3.600"]
    assert (dense[-1], routed[-1]) == ("1.000", "1.250")


def test_the_text_says_what_it_was_measured_on():
    text = comparison(ROWS + DENSE).markdown()
    assert text.splitlines()[0].startswith("| heads on | router | shared |")
    assert "the original's is 3.0" in text
    assert "abacus, 1 thread(s), fp32; seeds 0, 1; torch 2" in text


def test_the_text_explains_what_is_there_alone():
    legends = [comparison(rows).legend for rows in (ROWS, DENSE)]
    assert ["±" in legend for legend in legends] == [True, False]
    assert ["To dense" in legend for legend in legends] == [False, True]


def test_a_line_for_each_share_of_heads():
    (axes,) = recovery_curves(ROWS + DENSE).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()[1:]}
    assert lines == {
        "75 % of the heads, fitted": [[0, 50.0], [640, 67.5]],
        "every head on": [[0, 100.0], [640, 83.33]],
    }


def test_a_curve_that_fails_halfway_leaves_the_old_one(tmp_path, monkeypatch):
    def fail(_, file, **options):
        file.write_bytes(b"half")
        raise OSError("the disk is full")

    report(ROWS, tmp_path, {})
    before = (tmp_path / "recovery.png").read_bytes()
    assert before.startswith(b"\x89PNG")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk is full"):
        report(ROWS, tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recovery.png", "results.csv"]
    assert (tmp_path / "recovery.png").read_bytes() == before
