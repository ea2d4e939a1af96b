"""A few of the cases of tests/fuzz.py, which makes thousands."""

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")


@pytest.mark.parametrize("cases", ["20", pytest.param("40", marks=pytest.mark.long)])
def test_odd_input_ends_every_command_with_one_line(tmp_path, cases):
    """In a process of its own, that has no threads yet which a fork would lose."""
    command = [
        sys.executable,
        FUZZ,
        "--seed",
        "17",
        "--cases",
        cases,
        "--directory",
        tmp_path / "a",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'refused': " in done.stdout
