"""Tests in several processes: outside conftest.py, whose name several modules have."""

import copy
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from torch import distributed
from torch.multiprocessing import start_processes

# A process that has imported these is there once, and the others are its forks.
_IMPORTED = ["headwise", "transformers.models.llama.modeling_llama", "transformers.trainer"]


def run_in(processes: int, store: str, function: Callable[..., None], *arguments: object) -> None:
    """function(rank, *arguments) in so many processes; what it raises in one is raised here."""
    shared = (processes, store, function, arguments)
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    start_processes(_in_process, shared, nprocs=processes, start_method="forkserver")


def _in_process(
    rank: int,
    processes: int,
    store: str,
    function: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    try:
        # Tensors come in memory that all share.
        function(rank, *copy.deepcopy(arguments))
    finally:
        distributed.destroy_process_group()


def run_python(program: str, cwd: Path | None = None) -> str:
    """What the program prints; a warning ends it, and its end by an error is the test's."""
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
