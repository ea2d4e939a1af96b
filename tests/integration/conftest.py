"""Tiny runs of the command line on real text, each in a process of its own."""

import argparse
import inspect
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY = shlex.split(
    "--dim 32 --num-heads 4 --num-layers 2 --mlp-dim 64 --vocab-size 512 --sequence-length 64 "
    "--batch-size 4 --eval-every 10 --save-every 10 --log-every 5 --eval-blocks-per-file 1 "
    "--warmup-steps 3"
)


class Commands:
    """Builds and runs commands on one small file of text."""

    def __init__(self, text: Path):
        self.text = text

    def train(self, output: Path, *fields: str) -> list[str]:
        """Arguments of `headwise` for a tiny run."""
        return [
            "train", "lm", *TINY, "--data", str(self.text), "--output", str(output), *fields,
        ]  # fmt: skip

    def start(
        self,
        arguments: list[str],
        launcher: tuple[str, ...] = (sys.executable,),
        script: Path | None = None,
    ) -> subprocess.Popen:
        """Starts it, or a script that does; one thread a process, the same sums everywhere."""
        command = ("-m", "headwise") if script is None else (str(script),)
        return subprocess.Popen(
            [*launcher, *command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )

    def run(self, arguments: list[str], **options: Any) -> str:
        """Runs it to its end; what it printed."""
        process = self.start(arguments, **options)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return output


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Text from four modules of the standard library, 180 kB."""
    text = tmp_path_factory.mktemp("text") / "library.txt"
    modules = (argparse, inspect, shutil, textwrap)
    text.write_text("".join(Path(module.__file__).read_text() for module in modules))
    return Commands(text)


@pytest.fixture
def headwise(capsys: pytest.CaptureFixture, verbosity: None) -> Callable[..., str]:
    """Calls the command in this process; what it printed to stdout."""
    from headwise.cli import main

    def call(*arguments: object) -> str:
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call
