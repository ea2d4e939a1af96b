"""Commands that kill themselves as they are about to change a file, as kill -9 may at any time."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, get_context
from pathlib import Path

import psutil
import pytest

# A server imports this module once; the processes that it forks have all imports done.
import headwise.commands.train
import headwise.commands.tune
import headwise.recipes.dit
import headwise.recipes.lm
import headwise.recipes.vit  # noqa: F401
from headwise.cli import main

# Launchers of two processes that train one set of models.
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
TWO_PROCESSES = (
    *LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
)  # fmt: skip
_CHANGES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


class Killer:
    """Runs commands on an output directory, each in a process of its own.

    Args:
        output: Directory that the commands write into.
        log: What they print is added to this file.
    """

    def __init__(self, output: Path, log: Path):
        self.output, self.log = output, log
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        # Python 3.11 does not tell the server where to import from.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()

    def run(self, arguments: list[str], kill_at: int = 0) -> bool:
        """Whether it came to its end, without being killed before its `kill_at`-th change."""
        if (self.output / "run.json").exists():
            arguments = [*arguments, "--resume"]
        process = self.context.Process(
            target=_run, args=(arguments, str(self.output), str(self.log), kill_at)
        )
        process.start()
        process.join(120)
        assert process.exitcode in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        return process.exitcode == 0

    def run_to_its_end(self, arguments: list[str], every: int = 3) -> int:
        """Killed at a change near the start, resumed, killed later, until it ends: how often."""
        kills = 0
        while not self.run(arguments, kill_at=1 + every * kills):
            kills += 1
        return kills


def _run(arguments: list[str], output: str, log: str, kill_at: int) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    changes = 0

    def watch(event: str, values: tuple) -> None:
        nonlocal changes
        if event in _CHANGES and _is_change(event, values, output):
            changes += 1
            if changes == kill_at:
                print(f"killed at {event} {values}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    main(arguments)


def _is_change(event: str, values: tuple, output: str) -> bool:
    if event == "open":
        path, _, flags = values
        return str(path).startswith(output) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    # shutil removes what is in a directory by name, relative to the directory that it has open.
    inside = event in ("os.remove", "os.rmdir") and values[1] != -1
    return inside or str(values[0]).startswith(output)


def kill_a_worker(process: subprocess.Popen, when: Path) -> None:
    """One of two that train side by side, as soon as there is that path; the command says so."""
    wait_for(when, process)
    workers = [x for x in psutil.Process(process.pid).children() if "spawn_main" in x.cmdline()[-2]]
    assert len(workers) == 2
    workers[0].kill()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1, printed
    assert "was killed, out of memory perhaps; the same command with --resume" in printed


def kill(process: subprocess.Popen, when: Path) -> None:
    """As soon as there is that path."""
    wait_for(when, process)
    process.send_signal(signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, printed


def wait_for(path: Path, process: subprocess.Popen) -> None:
    wait = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < wait:
        time.sleep(0.005)
