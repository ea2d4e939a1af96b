"""A file of a run is damaged: the command names it in a line and loses nothing, or goes on."""

import shutil
from pathlib import Path

import pytest

from damage import contents, empty, flip_a_bit, halve, write

NAME = "moh_mh_moe-seed0"
FIELDS = ("--models", "moh_mh_moe", "--steps", "4", "--save-every", "2")


DAMAGES = {
    "removed": Path.unlink, "emptied": empty, "halved": halve, "flipped": flip_a_bit,
    "null": write("null"), "list": write("[1]"), "object": write('{"models": 1, "run": []}'),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(commands, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    commands.run(commands.train(run, *FIELDS))
    return run


def refuse(headwise, capsys, file: Path, *arguments: object) -> None:
    run = next(parent for parent in file.parents if (parent / "checkpoints").exists())
    before = contents(run)
    with pytest.raises(SystemExit) as end:
        headwise(*arguments)
    printed = capsys.readouterr().err.splitlines()
    (line,) = [line for line in printed if line.startswith("headwise: ")]
    assert end.value.code in (1, 2)
    # A directory without its run.json or record.json is said to hold no run.
    assert str(file) in line or (not file.exists() and str(file.parent) in line), line
    assert line == printed[-1]
    assert contents(run) | {".lock": ""} == before | {".lock": ""}


@pytest.mark.parametrize("name", ["run.json", "record.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_configuration_or_record(commands, headwise, capsys, finished, damage, name):
    """The one is resumed with, the other reported on."""
    resumed = commands.train(finished, *FIELDS, "--resume")
    file = finished / name
    content = file.read_bytes()
    DAMAGES[damage](file)
    try:
        refuse(headwise, capsys, file, *(resumed if name == "run.json" else ("report", finished)))
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("damage", ["removed", "flipped"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_resuming_with_damaged_weights(
    commands, headwise, capsys, finished, tmp_path, damage, interrupted
):
    """Of a finished model, or of the last checkpoint of one that is not: any of its files."""
    run = shutil.copytree(finished, tmp_path / "run")
    directory = run / "models" / NAME
    if interrupted:
        shutil.rmtree(run / "models")
        directory = run / "checkpoints" / NAME / "checkpoint-4"
    files = sorted(directory.iterdir())
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        DAMAGES[damage](file)
        refuse(headwise, capsys, file, *commands.train(run, *FIELDS, "--resume"))
        file.write_bytes(content)


def test_what_is_drawn_from_the_models_is_written_again(commands, headwise, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    table = (run / "results.csv").read_text()
    for file in run.iterdir():
        if file.is_file() and file.name not in ("run.json", ".lock"):
            file.write_bytes(b"\xff")
    headwise(*commands.train(run, *FIELDS, "--resume"))
    assert (run / "results.csv").read_text() == table
    assert headwise("report", run).strip() == str(run / "report.html")


def test_without_its_models_a_run_goes_on_from_the_checkpoints(
    commands, headwise, finished, tmp_path
):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "models")
    shutil.rmtree(run / "checkpoints" / NAME / "checkpoint-4")
    headwise(*commands.train(run, *FIELDS, "--resume"))
    weights = Path("models") / NAME / "model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()
