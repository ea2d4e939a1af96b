"""What the machine could do at best, as measured: the least time that work can take."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch

from headwise.training.timing import synchronize

_ROUNDS, _SECONDS = 5, 1.0  # at least, for one figure
_READ = 2**29  # bytes: more than caches hold
_SIDES = (1024, 2048)  # of square matrices; one of them runs best
_SIDES_ON_A_GPU = (4096, 8192)


class Work(NamedTuple):
    """What no implementation can leave out.

    Attributes:
        flops: Of products: two for a multiplication and an addition.
        read: Bytes of weights, keys and values.
        kept: Bytes of results that are there at the end, None where they are no matter.
    """

    flops: float
    read: float
    kept: float | None = None


@dataclass(frozen=True)
class Machine:
    """Peaks, each the best of some runs.

    Attributes:
        bandwidth: Bytes a second, read by all threads from a tensor that no cache holds.
        products: FLOPs a second by dtype, of torch's products of square matrices.
        memory: Bytes that were free.
    """

    bandwidth: float
    products: Mapping[torch.dtype, float]
    memory: float

    def limit(self, work: Work, dtype: torch.dtype) -> float:
        """Milliseconds: of reading or of computing, whichever takes longer.

        As if one ran behind the other. What a cache holds may be read faster, and kernels that
        beat torch's products may compute faster.
        """
        return 1e3 * max(work.read / self.bandwidth, work.flops / self.products[dtype])


def measure_machine(
    device: torch.device, dtypes: Sequence[torch.dtype], *, toy: bool = False
) -> Machine:
    """Peaks of the machine with the threads that torch has now: seconds."""
    read = torch.ones(_READ // (256 if toy else 1) // 4, device=device)
    least = 0.0 if toy else _SECONDS
    bandwidth = read.nbytes / _fastest(read.sum, device, least)
    sides = (67,) if toy else _SIDES_ON_A_GPU if device.type == "cuda" else _SIDES
    products = {}
    for dtype in dtypes:
        squares = [torch.randn(side, side, device=device).to(dtype) for side in sides]
        times = [_fastest(partial(torch.matmul, x, x), device, least) for x in squares]
        products[dtype] = max(2 * n**3 / t for n, t in zip(sides, times, strict=True))
    return Machine(bandwidth, products, free_memory(device))


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the device computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _fastest(run: Callable[[], Any], device: torch.device, least: float) -> float:
    """Seconds of the fastest of some runs, after one to warm up; for so long at least."""
    run()
    taken: list[float] = []
    while len(taken) < _ROUNDS or sum(taken) < least:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return min(taken)
