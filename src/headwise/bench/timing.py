"""Times that can be compared: side by side in one run, interleaved, medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmups: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of each candidate, run as A B C A B C …, after some warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmups + rounds):
        for name, run in candidates.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warmups:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


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
