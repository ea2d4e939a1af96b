"""What the fixture `two_processes` runs: outside conftest.py, whose name several modules have."""

import copy
from collections.abc import Callable

from torch import distributed, multiprocessing


def run_in_two(store: str, function: Callable[..., None], *arguments: object) -> None:
    """function(rank, *arguments) in two processes; what it raises in one is raised here."""
    multiprocessing.spawn(_in_process, (store, function, arguments), nprocs=2)


def _in_process(
    rank: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        # Tensors come in memory that both share.
        function(rank, *copy.deepcopy(arguments))
    finally:
        distributed.destroy_process_group()
