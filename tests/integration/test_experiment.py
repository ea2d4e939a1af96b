"""A study from end to end: side by side or one by one, killed and started again."""

import os
import shlex
import time
from functools import partial
from pathlib import Path

import pytest
from killing import kill, kill_a_worker
from outcomes import losses, rows_but

SMALL = shlex.split(
    "--dim 24 --num-heads 4 --num-layers 2 --mlp-dim 64 --vocab-size 300 --sequence-length 32 "
    "--batch-size 4 --eval-every 20 --save-every 10 --steps 40 --eval-blocks-per-file 1 "
    "--warmup-steps 3 --models dense moh_mh_moe --seeds 0 1 --protocol plain"
)
rows = partial(rows_but, measured=("per_second", "threads", "workers"))


@pytest.fixture(scope="module")
def arguments(commands):
    def build(output: Path, *fields: str) -> list[str]:
        study = ["experiment", "combined", "--data", str(commands.text), "--output", str(output)]
        return [*study, *SMALL, *fields]

    return build


@pytest.fixture(scope="module")
def whole(commands, arguments, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("studies") / "whole"
    printed = commands.run(arguments(run))
    assert "4/4  " in printed
    assert "combined: Do MoH and MH-MoE add up in one model?" in printed
    return run


def test_leaves_table_figure_page_and_logs(whole):
    assert [(row["model"], row["seed"]) for row in rows(whole)] == [
        ("dense", "0"), ("dense", "1"), ("moh_mh_moe", "0"), ("moh_mh_moe", "1"),
    ]  # fmt: skip
    assert (whole / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "Do MoH and MH-MoE add up" in (whole / "report.html").read_text()
    assert "step 40/40" in (whole / "logs" / "dense-seed1.log").read_text()


def test_one_by_one_equals_side_by_side(commands, arguments, whole, tmp_path):
    commands.run(arguments(tmp_path / "run", "--workers", "1"))
    assert rows(tmp_path / "run") == rows(whole)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.long
def test_killed_and_started_again_ends_with_the_same_table(commands, arguments, whole, tmp_path):
    run = tmp_path / "killed"
    process = commands.start(arguments(run))
    kill(process, when=run / "models" / "dense-seed0")
    assert not (run / "results.csv").exists(), "the study was over before the kill"
    _wait_until_still(run)
    commands.run(arguments(run, "--resume"))
    assert rows(run) == rows(whole)


@pytest.mark.long
def test_a_killed_worker_ends_the_study_and_it_goes_on(commands, arguments, whole, tmp_path):
    run = tmp_path / "killed"
    process = commands.start(arguments(run))
    kill_a_worker(process, when=run / "checkpoints" / "dense-seed0" / "checkpoint-10")
    assert not (run / "results.csv").exists(), "the study was over before the kill"
    commands.run(arguments(run, "--resume"))
    assert rows(run) == rows(whole)


def _wait_until_still(run: Path) -> None:
    """The processes of a study end with it: nothing writes into its directory any more."""

    def newest() -> int:
        return max(os.stat(path).st_mtime_ns for path in run.rglob("*"))

    time.sleep(1)
    before = newest()
    time.sleep(2)
    assert newest() == before
