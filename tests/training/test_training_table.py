"""The comparison table, by hand: means and deviations over seeds, quartiles, Markdown."""

from io import StringIO

import pytest
from rich.console import Console

from headwise.results.rows import Row, read_csv, write_csv
from headwise.training.measures import demerit, measures
from headwise.training.table import comparison, for_terminal


def markdown(rows: list[Row]) -> str:
    return comparison(rows).markdown()


LABELS = {"moh": "MoH", "dense": "dense"}


def row(model: str, seed: int, perplexity: float, **changes: object) -> dict[str, object]:
    return {
        "recipe": "lm", "model": model, "label": LABELS[model], "seed": seed,
        "parameters": 1_500_000, "active_parameters": 1_250_000, "active_heads": 0.75,
        "flops": 3_000_000, "flops_counted": 3_100_000, "unit": "token",
        "eval_blocks_per_file": 4, "perplexity_code": perplexity,
        "perplexity_code_q1": 8.0, "perplexity_code_q3": 30.0,
        "per_second": 1234, "workers": 1, "steps": 400, "seen": 819_200,
        "device": "a CPU", "threads": 2, "precision": "fp32",
        "torch": "2", "transformers": "5", "python": "3", **changes,
    }  # fmt: skip


ROWS = [row("moh", 0, 30.0), row("moh", 1, 34.0), row("dense", 0, 11.0, per_second=999)]


def test_one_line_a_model_with_deviation_over_seeds():
    table = comparison(ROWS)
    moh, dense = table.printed()
    assert table.columns[5:] == ["heads on", "PPL code ↓", "tokens/s ↑"]
    # mean 32, deviation sqrt(((30 - 32)² + (34 - 32)²) / 1) = 2.8
    assert moh == ["MoH", "1.50", "1.25", "3.00", "3.10", "75 %", "32.0 ± 2.8 (8–30)", "1,234"]
    assert dense[-2:] == ["11.00 (8–30)", "999"]


SEARCHED = {"learning_rate": 0.006, "rates_tried": "0.003 0.006 0.012"}


def test_a_rate_of_its_own_is_shown_and_marked_where_its_grid_ends():
    at_an_end = {"learning_rate": 0.012, "rates_tried": "0.003 0.006 0.012"}
    rows = [row("moh", 0, 30.0, **SEARCHED), row("dense", 0, 31.0, **at_an_end)]
    table = comparison(rows)
    at = table.columns.index("learning rate")
    assert [line[at] for line in table.printed()] == ["0.006", "0.012 (edge)"]
    assert "the least loss on the validation half" in table.legend
    assert "(edge): the best of its grid is an end of it" in table.legend
    assert "(edge)" not in comparison(rows[:1]).legend
    assert "learning rate" not in comparison(ROWS).columns


def test_what_a_model_was_worth_on_its_way_has_columns_and_terminals_do_without():
    rows = [
        row("moh", seed, 30.0, early_steps=130, early_perplexity_code=value)
        for seed, value in ((0, 55.5), (1, 57.5))
    ]
    table = comparison(rows)
    at = table.columns.index("PPL code after 130 steps ↓")
    assert table.printed()[0][at] == "56.5 ± 1.4"
    assert [measure.key for measure in measures(rows[0])] == ["perplexity_code"]
    console = Console(width=80, record=True, file=StringIO())
    console.print(for_terminal(rows, ""))
    drawn = " ".join(console.export_text().split())
    assert "56.5" not in drawn
    assert "Not shown here: active (M), counted, PPL code after 130 steps ↓;" in drawn


def test_measures_are_what_a_row_has():
    assert [m.column for m in measures(ROWS[0])] == ["PPL code ↓"]
    assert [m.column for m in measures({"top1": 97.5, "fid": 3.0})] == ["top-1 (%) ↑", "FID ↓"]


def test_the_best_row_has_least_of_what_is_bad_and_most_of_what_is_good():
    rows = [{"top1": 50.0, "fid": 4.0}, {"top1": 50.0, "fid": 3.0}, {"top1": 90.0, "fid": 4.0}]
    assert [rows.index(row) for row in sorted(rows, key=demerit)] == [2, 1, 0]
    assert demerit({"recognised": 0.0}) > demerit({"recognised": 0.1})


def test_table_is_the_same_after_a_file(tmp_path):
    write_csv(tmp_path / "lm.csv", ROWS)
    assert markdown(read_csv(tmp_path / "lm.csv")) == markdown(ROWS)
    assert markdown(ROWS).splitlines()[1].startswith("| --- | ---: |")
    assert [line[:9] for line in markdown(ROWS).splitlines()[2:4]] == ["| MoH | 1", "| dense |"]


def test_published_figures_stand_in_columns_of_their_own():
    rows = [row("dense", 0, 11.0, recipe="moh-budget"), row("moh", 0, 10.0, recipe="moh-budget")]
    table = comparison(rows)
    assert table.columns[-1] == "LLM-S ↑ (published)"
    assert [line[-1] for line in table.rows] == ["43.9", "–"]
    assert "by arXiv 2410.11842; not measured here" in markdown(rows)
    assert "counted:" in markdown(rows)
    assert "counted:" not in str(for_terminal(rows, "").caption), "the column is not there"
    assert "published" not in markdown(ROWS)


def test_speed_of_models_trained_side_by_side_is_not_shown():
    rows = [row("moh", 0, 10.0), row("dense", 0, 11.0, workers=2)]
    assert "tokens/s ↑" not in comparison(rows).columns
    assert "tokens/s" not in markdown(rows)
    assert "tokens/s" in markdown(ROWS)


def test_many_domains_leave_no_room_for_quartiles():
    many = row("dense", 0, 30.0) | {f"perplexity_{x}": 25.0 for x in ("de", "fr", "ja")}
    assert comparison([many]).printed()[0][6:10] == ["30.0", "25.0", "25.0", "25.0"]
    assert "quartiles" not in markdown([many])
    assert "quartiles" in markdown(ROWS)


def test_mistyped_text_has_columns_of_its_own():
    texts = ("code_typos_5", "prose", "prose_typos_0.5", "prose_typos_5")
    rows = [row("dense", 0, 30.0, **{f"perplexity_{text}": 25.0 for text in texts})]
    assert [measure.subject for measure in measures(rows[0])] == [
        "code", "code, 5 % typos", "prose", "prose, 0.5 % typos", "prose, 5 % typos",
    ]  # fmt: skip
    assert "PPL code, 5 % typos ↓" in comparison(rows).columns
    assert "compare models in such a column" in markdown(rows)
    assert "typos" not in markdown(ROWS)


def test_eight_measures_fit_a_terminal():
    texts = [
        f"{x}{y}" for x in ("code", "prose") for y in ("", "_typos_1", "_typos_5", "_typos_10")
    ]
    scored = {f"perplexity_{text}": 128.9 for text in texts} | {"label": "MoH + sparse MoE"}
    scored |= {"learning_rate": 0.006, "rates_tried": "0.003 0.006 0.012"}
    rows = [row("moh", 0, 90.0, **scored), row("moh", 1, 99.0, **scored | {texts[-1]: 99.0})]
    console = Console(width=80, record=True, file=StringIO())
    console.print(for_terminal(rows, ""))
    drawn = console.export_text()
    assert "…" not in drawn
    assert drawn.count(" 128.9") + drawn.count(" 113.9") == len(texts), "no number is broken"
    assert {"code,", "prose,", "typos", "sparse"} <= set(drawn.split()), "nor a word"
    assert (
        "Not shown here: params (M), active (M), counted, learning rate, tokens/s ↑; results.csv"
    ) in " ".join(drawn.split())
    assert "median step" not in drawn
    assert "learning rate:" not in drawn


def test_the_legend_says_how_much_was_scored():
    amounts = {"scored_files_code": 36, "scored_tokens_code": 106_596}
    two = amounts | {
        "perplexity_prose": 25.0, "perplexity_prose_q1": 8.0, "perplexity_prose_q3": 30.0,
        "scored_files_prose": 9, "scored_tokens_prose": 22_345,
    }  # fmt: skip
    assert (
        "PPL: perplexity of held-out text: code 36 files, 106,596 tokens; prose 9 files, 22,345 "
        "tokens; of up to 4 blocks of a file, in brackets the quartiles of the files. MFLOPs"
    ) in markdown([row("dense", 0, 30.0, **two)])
    assert [m.key for m in measures(two)] == ["perplexity_prose"]


def test_the_legend_of_rows_that_do_not_say_how_much_was_scored():
    assert (
        "PPL: perplexity of the held-out files, of up to 4 blocks of each, in brackets the "
        "quartiles of the files. MFLOPs"
    ) in markdown(ROWS)


NEW = ("scored_images", "scored_pairs", "real_images")


@pytest.mark.parametrize(
    ("recipe", "columns", "sentence"),
    [
        ("vit", {"top1": 1.0, "scored_images": 2500}, "Scored: 2,500 images."),
        ("masked", {"perplexity_text": 2.0, "scored_pairs": 89}, "Scored: 89 pairs."),
        (
            "dit", {"fid": 2.0, "samples": 300, "real_images": 1618},
            "Drawn: 300 images, compared with 1,618 that were trained on.",
        ),
    ],
)  # fmt: skip
def test_the_legend_says_how_many_images_were_scored(recipe, columns, sentence, tmp_path):
    of_text = {"eval_blocks_per_file", *(key for key in ROWS[0] if "perplexity" in key)}
    plain = {key: value for key, value in row("dense", 0, 2.0).items() if key not in of_text}
    new = [plain | {"recipe": recipe} | columns]
    write_csv(tmp_path / "rows.csv", new)
    assert f"{sentence} MFLOPs" in markdown(read_csv(tmp_path / "rows.csv"))
    older = {key: value for key, value in new[0].items() if key not in NEW}
    assert "Scored" not in markdown([older])
    assert "Drawn" not in markdown([older])


def test_deviations_are_explained_where_there_are_several_seeds():
    assert "±" in markdown(ROWS)
    assert "±" not in markdown([row("moh", 0, 10.0), row("dense", 0, 11.0)])
