"""A directory that holds something else, or is damaged, is refused and stays as it was."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from damage import contents
from headwise.recipes import train
from headwise.recipes.lm import LanguageModelRun
from headwise.results.files import write_manifest
from headwise.training import directory
from tiny import LINES

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


def refuse(run: LanguageModelRun, match: str, **changes: object) -> None:
    before = contents(run.output.parent)
    with pytest.raises(ValueError, match=match):
        train(dataclasses.replace(run, **changes))
    assert contents(run.output.parent) == before


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
        ({"sequence_length": 1_000}, r"is 1000, longer than .* the longest has \d+ tokens"),
    ],
)
def test_text_too_short_is_refused_before_anything_is_written(run, changes, match):
    refuse(run, match, **changes)


def test_data_that_is_missing_is_refused_before_anything_is_written(finished):
    refuse(finished, "there is no such file", overwrite=True, data="/no/such")


WORK_IN = """
import os, pathlib, sys, time, filelock

file = pathlib.Path(sys.argv[1]) / ".lock"
with filelock.FileLock(file):
    file.write_text(str(os.getpid()))
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("changes", [{"resume": True}, {"overwrite": True}])
def test_only_one_process_works_in_a_directory(finished, changes):
    command = [sys.executable, "-c", WORK_IN, str(finished.output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        refuse(finished, f"process {other.pid} works in {finished.output}; wait", **changes)
        # Killed, it cannot give the directory back itself.
        other.send_signal(signal.SIGKILL)
    train(dataclasses.replace(finished, **changes))
    assert (finished.output / ".lock").read_text() == str(os.getpid())


def test_a_run_that_was_killed_as_it_began_starts_again(run):
    run.output.mkdir()
    (run.output / ".lock").write_text("1")
    (run.output / ".run.json.partial").write_text("{")
    train(run)
    assert not (run.output / ".run.json.partial").exists()


def test_an_overwrite_that_is_killed_leaves_a_run(finished, monkeypatch):
    def killed_at_the_last(path: Path) -> None:
        if path.name == "run.json":
            raise KeyboardInterrupt
        remove(path)

    remove = directory.remove
    monkeypatch.setattr(directory, "remove", killed_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(finished, overwrite=True))
    assert sorted(p.name for p in finished.output.iterdir()) == [".lock", "run.json"]


def halved(text: str) -> str:
    return text[: len(text) // 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "", halved, lambda _: "[]", lambda _: "{}", lambda _: "1", lambda _: "\ud800",
        lambda text: json.dumps({**json.loads(text), "run": None}),
        lambda text: json.dumps({"run": json.loads(text)["run"]}),
        lambda text: json.dumps({**json.loads(text), "fingerprint": ["a"]}),
    ],
)  # fmt: skip
def test_damaged_run_file_is_named(finished, damage):
    file = finished.output / "run.json"
    file.write_bytes(damage(file.read_text()).encode(errors="surrogatepass"))
    refuse(finished, f"^{file} cannot be read: .*; --overwrite deletes", resume=True)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_model_is_found_before_another_is_trained(finished, damage):
    broken = finished.output / "models" / "dense-seed0"
    seeds = {"seeds": (0, 1), "resume": True}
    saved = json.loads((finished.output / "run.json").read_text())
    saved["run"]["seeds"] = [0, 1]
    (finished.output / "run.json").write_text(json.dumps(saved))
    for file in broken.iterdir():
        content = file.read_bytes()
        damage(file)
        match = f"^{file} (is|cannot be) .*; delete {broken} to train that model again"
        refuse(finished, match, **seeds)
        file.write_bytes(content)
    train(dataclasses.replace(finished, **seeds))


def test_result_of_another_form_is_named(finished):
    model = finished.output / "models" / "dense-seed0"
    (model / "result.json").write_text(json.dumps({"row": {"model": "dense"}, "record": {}}))
    write_manifest(model)
    match = f"^{model}/result.json cannot be read: .*; delete {model} to"
    refuse(finished, match, resume=True)
