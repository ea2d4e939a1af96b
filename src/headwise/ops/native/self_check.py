"""The kernels' self-check: once on a machine, in a process of its own, and its result is kept.

An instruction that a processor has not would end the process that meets it. So a child meets it,
and a line says that there are no kernels. A result holds for one library beside one torch on one
processor; where results cannot be kept, every process checks.
"""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from headwise.ops.native.levels import instructions

_CHECK = Path(__file__).with_name("check.py")
_SECONDS = 300


def what_is_wrong(library: Path, results: Path | None) -> str:
    """Nothing, or why the library cannot be used here, to be read after its name.

    Args:
        library: Kernels that were not checked here, or were.
        results: A directory in which results are kept; None keeps none.
    """
    about = (torch.__version__, instructions(), hashlib.sha256(library.read_bytes()).hexdigest())
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    kept = results and results / f"checked-{name}"
    if kept and kept.exists():
        return kept.read_text()
    wrong, is_final = _in_a_child(library)
    if kept and is_final:
        beside = kept.with_name(f"{kept.name}-{os.getpid()}")
        try:
            beside.write_text(wrong)
            beside.replace(kept)
        except OSError:
            beside.unlink(missing_ok=True)  # a full disk: the next process checks again
    return wrong


def _in_a_child(library: Path) -> tuple[str, bool]:
    """What is wrong, and whether it would be again."""
    if not sys.executable:
        return "cannot be checked: this Python does not know its own program", False
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_CHECK), str(library)],
            capture_output=True, text=True, timeout=_SECONDS, env=environment,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"could not be checked: {error}", False
    if done.returncode == 0:
        return "", True
    if done.returncode < 0:
        number = -done.returncode
        killed = number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        return f"ended its check by {signal.Signals(number).name}", not killed
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"failed its check: {lines[-1][:300]}", True
