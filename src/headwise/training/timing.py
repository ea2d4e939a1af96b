"""Times that can be compared: side by side in one run, interleaved, medians."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Our error against float64 may be this many times that of plain PyTorch in the same dtype.
LARGEST_ERROR_RATIO = 2.0
# Where rounds take too long for more.
_FEWEST_ROUNDS = 3
# Cycles that a GPU waits, a millisecond or two: Python queues a handful of kernels meanwhile.
_HOLD = 2_000_000


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    warmups: int,
    device: torch.device,
    launches: bool = True,
    most_seconds: float = math.inf,
) -> dict[str, float]:
    """Median milliseconds of each candidate, run as A B C A B C …, after some warm-ups.

    There are as many rounds as asked for, and more until so many seconds have passed; but only as
    many as take `most_seconds`, though never less than three. On a GPU, without `launches`, only
    the kernels count, not the time that Python takes to launch them.
    """
    clock = _by_events if device.type == "cuda" and not launches else partial(_by_clock, device)
    for _ in range(warmups):
        _round(candidates, clock)
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - start < seconds:
        late = time.perf_counter() - start >= most_seconds
        if late and len(times) >= min(rounds, _FEWEST_ROUNDS):
            break
        times.append(_round(candidates, clock))
    medians = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
    return dict(zip(candidates, medians, strict=True))


def _round(
    candidates: Mapping[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], float]
) -> list[float]:
    return [clock(run) for run in candidates.values()]


def _by_clock(device: torch.device, run: Callable[[], Any]) -> float:
    """Seconds until the result is there."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _by_events(run: Callable[[], Any]) -> float:
    """Seconds on the GPU, which is held up until all kernels are queued."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HOLD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def error_ratio(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> float:
    """The largest ‖ours - exact‖ / ‖plain - exact‖ over corresponding tensors.

    Where plain is exact, as a gradient of 0 is, ours must be too: then it counts as 0 or infinite.
    """
    ratios = []
    for got, usual, true in zip(ours, plain, exact, strict=True):
        error = float((got.double() - true).norm())
        usual_error = float((usual.double() - true).norm())
        # Sums of thousands of values differ by their order alone: that much is no error.
        floor = float(true.norm()) * torch.finfo(got.dtype).eps / 16
        ratios.append(error / max(usual_error, floor) if error > 0 else 0.0)
    return max(ratios)
