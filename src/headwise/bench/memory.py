"""What a run adds to the memory in use, at its peak."""

import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

# Short runs are repeated for so many seconds: the watcher may miss the peak of one.
_SECONDS = 0.3


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """MiB that a run adds at its peak; on a CPU, of the whole process.

    On a CPU a watcher reads what the process has. ru_maxrss would tell the peak of the imports;
    the kernel's own counter cannot be reset everywhere.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        run()
        while time.perf_counter() - start < _SECONDS:
            run()
    finally:
        done.set()
        watcher.join()
    return (highest - before) / 2**20
