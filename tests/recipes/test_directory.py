"""A directory that holds something else is refused and stays as it was."""

import dataclasses
from pathlib import Path

import pytest

from headwise.recipes import LanguageModelRun
from headwise.recipes.directory import write_whole
from headwise.recipes.train import train

LINES = "".join(f"line {i}\n" for i in range(2000))
TINY = {
    "models": ("dense",), "dim": 16, "num_heads": 2, "num_layers": 1, "mlp_dim": 24,
    "vocab_size": 300, "sequence_length": 8, "batch_size": 1, "steps": 1, "warmup_steps": 0,
    "eval_blocks_per_file": 1,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> LanguageModelRun:
    """Not yet begun."""
    (tmp_path / "text.txt").write_text(LINES)
    return LanguageModelRun(output=tmp_path / "run", data=str(tmp_path / "text.txt"), **TINY)


@pytest.fixture
def finished(run: LanguageModelRun) -> LanguageModelRun:
    train(run)
    return run


def tree(directory: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def refuse(run: LanguageModelRun, match: str, **changes: object) -> None:
    before = tree(run.output.parent)
    with pytest.raises(ValueError, match=match):
        train(dataclasses.replace(run, **changes))
    assert tree(run.output.parent) == before


def test_another_run_is_kept(finished):
    refuse(finished, "already holds a run; .* --resume .* --overwrite")


def test_overwrite_deletes_the_run_and_starts_anew(finished):
    leftover = finished.output / "models" / "moh-seed0"
    leftover.mkdir()
    train(dataclasses.replace(finished, overwrite=True, seeds=(1,)))
    assert [p.name for p in (finished.output / "models").iterdir()] == ["dense-seed1"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_kept(run, overwrite):
    run.output.mkdir()
    (run.output / "thesis.tex").write_text("years of work")
    refuse(run, f"output {run.output} holds files that are no run", overwrite=overwrite)


def test_an_empty_directory_is_taken(run):
    run.output.mkdir()
    train(run)
    assert (run.output / "results.csv").exists()


def test_nothing_to_resume(run):
    refuse(run, f"output {run.output} holds no run to resume", resume=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 7}, "steps is 7, but the run in .* has 1; resume with the same fields"),
        ({"learning_rate": 0.5}, r"learning_rate is 0\.5, but the run in .* has 0\.003"),
        ({"models": ("moh",)}, r"models is \['moh'\], but the run in .* has \['dense'\]"),
    ],
)
def test_resuming_with_other_fields_is_refused_by_name(finished, changes, match):
    refuse(finished, match, resume=True, **changes)


def test_resuming_with_other_text_is_refused(finished):
    Path(finished.data).write_text(LINES + "one more line\n")
    refuse(finished, "the data have changed", resume=True)


def test_resuming_may_move_and_track(finished, tmp_path):
    moved = finished.output.rename(tmp_path / "moved")
    train(dataclasses.replace(finished, output=moved, resume=True, report_to=("tensorboard",)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sequence_length": 100_000}, "sequence_length = 100000 needs at least as many"),
        ({"sequence_length": 1_000}, "sequence_length is 1000, longer than every held-out file"),
    ],
)
def test_text_too_short_is_refused_before_anything_is_written(run, changes, match):
    refuse(run, match, **changes)


def test_data_that_is_missing_is_refused_before_anything_is_written(finished):
    refuse(finished, "there is no such file", overwrite=True, data="/no/such")


def test_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "file"
    write_whole(file, lambda partial: partial.write_text("old"))

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(file, fail)
    assert tree(tmp_path) == {file: b"old"}


def test_directory_is_whole_or_not_there(tmp_path):
    target = tmp_path / "deep" / "model"

    def write(partial: Path) -> None:
        partial.mkdir()
        (partial / "weights").write_text("new")

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".model.partial").mkdir()  # left by a kill
    for _ in range(2):
        write_whole(target, write)
    assert tree(tmp_path / "deep") == {target: None, target / "weights": b"new"}
