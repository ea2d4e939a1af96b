"""`make` for somebody who has python3 and make: what is refused first, what is built on the way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What make reads of a checkout, where nothing is installed yet."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess:
    # A make that runs these tests must not hand its own options down.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("version", ["(2, 7)", "(3, 9, 18)", "(3, 10)"])
def test_a_python_that_is_too_old_is_named_before_anything_is_written(checkout, version):
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[2])"
    script(checkout / "old", f'exec "{sys.executable}" -c "{pretend}" "$@"')
    done = make(checkout, "demo", "PYTHON=./old")
    said, *of_make = done.stderr.splitlines()
    shown = ".".join(version.strip("()").split(", ")[:2])
    assert said == (
        f"headwise needs Python 3.11 or newer, and ./old is {shown}; "
        "another: make PYTHON=python3.11 demo"
    )
    assert all(line.startswith("make") for line in of_make)
    assert done.stdout == ""
    assert not (checkout / ".venv").exists()


def test_this_python_is_new_enough(checkout):
    script(checkout / "new", f'[ "$1" = -c ] || exit 7\nexec "{sys.executable}" "$@"')
    done = make(checkout, "demo", f"PYTHON={checkout / 'new'}")
    assert "needs Python" not in done.stderr
    assert "Installing" in done.stdout


@pytest.mark.parametrize(
    ("target", "ran"),
    # Tests build kernels of their own.
    [("demo", ["headwise compile", "headwise train"]), ("test", ["python -m"])],
)
def test_a_demo_builds_kernels_first_and_they_are_no_condition(checkout, target, ran):
    for name in ("headwise", "python"):
        script(checkout / ".venv/bin" / name, f'echo "ran {name} $1"; [ "$1" != compile ]')
    for stamp in ("core", "dev"):
        (checkout / ".venv" / stamp).touch()
    done = make(checkout, target)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert lines == [f"ran {what}" for what in ran]


def test_a_demo_that_was_stopped_goes_on_and_one_that_ended_is_made_anew(checkout):
    def option() -> str:
        return make(checkout, "--dry-run", "demo").stdout.splitlines()[-1].split()[-1]

    run = checkout / "runs" / "demo"
    assert option() == "--overwrite"
    (run / "checkpoints").mkdir(parents=True)
    assert option() == "--resume"
    (run / "report.html").touch()
    assert option() == "--overwrite"


def test_make_alone_says_what_there_is_and_does_nothing(checkout):
    done = make(checkout)
    assert done.returncode == 0
    assert "make demo: train five small models" in done.stdout
    assert "make test: the tests, all but the long ones" in done.stdout
    assert not (checkout / ".venv").exists()
