"""A study by the fair protocol from end to end; what was expected of it before it ran."""

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest

from headwise.cli import main
from headwise.commands.experiment import LOG, expectation
from headwise.recipes import train
from headwise.recipes.scales import tiny
from headwise.recipes.studies import STUDIES
from headwise.results.rows import read_csv
from tiny import LINES, RUN

STEPS = {"steps": 7, "log_every": 1, "eval_every": 3, "save_every": 1}
MEASURED = {"per_second"}


def rows(run: Path, name: str = "results") -> list[dict[str, str]]:
    return [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in read_csv(run / f"{name}.csv")
    ]


def mean_losses(tried: list[dict[str, str]], model: str) -> dict[str, float]:
    """Mean validation loss of each learning rate that was tried with every seed."""
    losses: dict[str, list[float]] = {}
    for row in tried:
        if row["model"] == model:
            losses.setdefault(row["learning_rate"], []).append(float(row["validation_loss"]))
    most = max(map(len, losses.values()))
    return {rate: fmean(values) for rate, values in losses.items() if len(values) == most}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("fair")
    (root / "text.txt").write_text(LINES)
    return dataclasses.replace(
        tiny("moh-components"),
        **RUN | STEPS | {"num_heads": 8},
        models=("dense", "static_75"), seeds=(3, 5), workers=1, learning_rate=0.04,
        data=str(root / "text.txt"), output=root / "run", expected="the static one behind",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(study):
    train(study)
    return study.output


def test_the_rate_of_least_validation_loss_is_that_of_all_seeds(finished):
    tried, chosen = rows(finished, "search"), rows(finished)
    assert [(row["model"], row["seed"]) for row in chosen] == [
        ("dense", "3"), ("dense", "5"), ("static_75", "3"), ("static_75", "5"),
    ]  # fmt: skip
    for model in ("dense", "static_75"):
        means, ours = mean_losses(tried, model), [r for r in chosen if r["model"] == model]
        best = min(means, key=means.__getitem__)
        assert [row["learning_rate"] for row in ours] == [best, best]
        rates = sorted({float(row["learning_rate"]) for row in tried if row["model"] == model})
        assert len(rates) >= 3
        assert [float(x) for x in ours[0]["rates_tried"].split()] == pytest.approx(rates)


def test_each_model_is_scored_after_a_third_of_its_steps_too(finished):
    for row in rows(finished):
        assert row["early_steps"] == "2"
        assert float(row["early_perplexity_text"]) > float(row["perplexity_text"])


def test_the_page_says_what_was_expected_and_the_table_what_was_chosen(finished):
    page = (finished / "report.html").read_text()
    assert "the static one behind" in page
    assert "PPL text after 2 steps" in page
    assert "learning rate: of the model" in page


def test_what_is_deleted_is_trained_again_to_the_same_end(study, finished, tmp_path):
    run = dataclasses.replace(study, output=tmp_path / "run", resume=True)
    shutil.copytree(finished, run.output)
    before = rows(finished)
    # One goes on after it was scored on the way, one begins anew.
    names = [f"{row['model']}-seed5-lr{row['learning_rate']}" for row in before[1::2]]
    for name in names:
        shutil.rmtree(run.output / "models" / name)
    shutil.rmtree(run.output / "checkpoints" / names[1])
    train(run)
    assert rows(run.output) == before


def test_another_expectation_afterwards_is_refused(study, finished):
    run = dataclasses.replace(study, resume=True, expected="the static one ahead")
    with pytest.raises(ValueError, match="expected is the static one ahead, but the run"):
        train(run)


def test_it_is_said_how_long_it_takes(study, tmp_path, capsys):
    run = dataclasses.replace(study, output=tmp_path / "run", models=("dense",), steps=3)
    train(run)
    said = capsys.readouterr().out
    assert "1 models, each trained about 6 times for its learning rate and seeds" in said
    assert "minutes of training in all" in said


LOGGED = """# Log

## First

Expected:

- **moh-budget**: flat, then
  worse.
- **combined**: nothing.

Came out:

- **moh-budget**: steep.

## Second

Expected:

- **moh-budget**: steep.
"""


def test_the_last_expectation_of_a_log_counts():
    assert expectation("moh-budget", LOGGED) == "steep."
    assert expectation("combined", LOGGED) == "nothing."
    assert expectation("moh", LOGGED) == expectation("noise", LOGGED) == ""
    assert expectation("moh-budget", LOGGED.partition("## Second")[0]) == "flat, then worse."


def test_beside_a_log_no_study_runs_of_which_it_expects_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    LOG.parent.mkdir()
    LOG.write_text(LOGGED)
    with pytest.raises(SystemExit):
        main(["experiment", "noise", "--output", "run"])
    said = capsys.readouterr().err
    assert "expected is '', and docs/log.md expects nothing of noise; before it runs" in said
    assert not Path("run").exists()


def test_a_study_begins_with_what_is_expected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    LOG.parent.mkdir()
    LOG.write_text(LOGGED)
    Path("text.txt").write_text(LINES)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
    fields = ["--protocol=plain", "--models", "dense", "--seeds", "0", "--workers=1", "--steps=1"]
    main(["experiment", "combined", "--data", "text.txt", "--output", "run", *sizes, *fields])
    assert "Expected: nothing." in capsys.readouterr().out
    assert json.loads(Path("run/run.json").read_text())["run"]["expected"] == "nothing."


def test_of_every_study_the_log_expects_something():
    log = (Path(__file__).parents[2] / LOG).read_text("utf-8")
    assert [name for name in STUDIES if not expectation(name, log)] == []


RESULTS = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_published_of_a_study_went_by_the_protocol(name):
    if not (RESULTS / f"{name}.csv").exists():
        pytest.skip(f"{name} has not run yet")
    published = read_csv(RESULTS / f"{name}.csv")
    if "rates_tried" not in published[0]:
        pytest.skip(f"{name} ran before the protocol")
    run = tiny(name)
    assert sorted((row["model"], int(row["seed"])) for row in published) == sorted(
        (variant.name, seed) for variant in run.variants() for seed in run.seeds
    )
    for row in published:
        rate, tried = float(row["learning_rate"]), [float(x) for x in row["rates_tried"].split()]
        assert min(tried) < rate < max(tried), f"{row['model']} is at the edge of its grid"
        assert (int(row["steps"]), int(row["early_steps"])) == (run.steps, run.early_steps)
        assert int(row.get("scored_tokens_prose", 20_000)) >= 20_000
    searched = read_csv(RESULTS / f"{name}-search.csv")
    for model in {row["model"] for row in published}:
        means = mean_losses(searched, model)
        best = {row["learning_rate"] for row in published if row["model"] == model}
        assert best == {min(means, key=means.__getitem__)}
