"""Model directories with a damaged file: a line that names it, and nothing lost."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from damage import contents, damaged_copy, damages, wrong_values
from fuzz_inputs import write_models
from headwise.cli import main

# Without one of these there is no model; the others only say more of it.
NEEDED = ("config.json", "model.safetensors")
STAGE = ("--routed.steps", "1", "--routed.warmup-steps", "0", "--eval-blocks", "1")
COMMANDS: dict[str, tuple[str, Callable[[Path, Path], list[Any]]]] = {
    "generate": ("dense", lambda path, _: ["generate", path, "--prompt", "a"]),
    "samples": (
        "dense",
        lambda path, new: ["samples", path, "-o", new / "a.parquet", "--count", 2, "--length", 3],
    ),
    "convert": ("dense", lambda path, new: ["convert", path, "-o", new / "a"]),
    "generate converted": ("converted", lambda path, _: ["generate", path, "--prompt", "a"]),
    "tune": (
        "converted",
        lambda path, new: [
            "tune", path, "-o", new / "a", "--data", path.parent / "text.txt",
            "--sequence-length", 8, "--batch-size", 2, *STAGE,
        ],
    ),
    "sample": ("dit", lambda path, new: ["sample", path, "-o", new / "a.png", "--steps", 1]),
    "eval": ("vit", lambda path, _: ["eval", path, "--images", path.parent / "images"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One tiny model of each kind, a text and images."""
    root = tmp_path_factory.mktemp("saved")
    write_models(root)
    (root / "text.txt").write_text("".join(f"line {i} a b c\n" for i in range(40)))
    return root


@pytest.fixture
def ends(capsys, tmp_path) -> Callable[..., tuple[int, str]]:
    """Runs a command; its status and what it wrote to stderr."""

    def run(arguments: list[Any]) -> tuple[int, str]:
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        (tmp_path / "new").mkdir()
        capsys.readouterr()
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, capsys.readouterr().err

    return run


def faults(saved: Path, tmp_path: Path, ends: Any, command: str, cases: Any) -> list[str]:
    """What went otherwise than it should, a line a case."""
    name, arguments = COMMANDS[command]
    found, copied = [], saved / "copy"
    for file, how, damage in cases:
        copy = damaged_copy(saved / name, copied, file, damage)
        before = contents(copy)
        status, said = ends(arguments(copy, tmp_path / "new"))
        fine = status == 0 or (
            status in (1, 2)
            and said.startswith("headwise: ")
            and said.count("\n") == 1
            and str(copy) in said
            and not any((tmp_path / "new").iterdir())
        )
        gone = file in NEEDED and how in ("removed", "emptied", "halved", "a directory")
        if not fine or (gone and status == 0) or contents(copy) != before:
            found.append(f"{file} {how}: {status} {said[:300]}")
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_file_is_named_and_nothing_lost(saved, tmp_path, ends, command):
    assert ends(COMMANDS[command][1](saved / COMMANDS[command][0], tmp_path / "new"))[0] == 0
    cases = damages(saved / COMMANDS[command][0])
    assert faults(saved, tmp_path, ends, command, cases) == []


@pytest.mark.parametrize("command", ["generate", "convert", "generate converted", "sample", "eval"])
def test_a_wrong_value_in_a_config_is_laid_to_the_directory(saved, tmp_path, ends, command):
    cases = wrong_values(saved / COMMANDS[command][0] / "config.json")
    assert faults(saved, tmp_path, ends, command, cases) == []
