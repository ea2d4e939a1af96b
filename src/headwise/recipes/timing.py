"""Times that can be compared: side by side in one run, interleaved, medians."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Our error against float64 may be this many times that of plain PyTorch in the same dtype.
LARGEST_ERROR_RATIO = 2.0
# Where rounds take too long for more.
_FEWEST_ROUNDS = 3


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    warmups: int,
    device: torch.device,
    most_seconds: float = math.inf,
) -> dict[str, float]:
    """Median milliseconds of each candidate, run as A B C A B C …, after some warm-ups.

    There are as many rounds as asked for, and more until they have taken so many seconds;
    but only as many as take `most_seconds`, though never less than three.
    """
    for _ in range(warmups):
        _round(candidates, device)
    times: list[list[float]] = []
    taken = 0.0
    while len(times) < rounds or taken < seconds:
        if len(times) >= min(rounds, _FEWEST_ROUNDS) and taken >= most_seconds:
            break
        times.append(_round(candidates, device))
        taken += sum(times[-1])
    medians = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
    return dict(zip(candidates, medians, strict=True))


def _round(candidates: Mapping[str, Callable[[], Any]], device: torch.device) -> list[float]:
    seconds = []
    for run in candidates.values():
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


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
