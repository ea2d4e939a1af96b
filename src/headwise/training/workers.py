"""Models trained side by side, each in a process of its own."""

import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from rich.progress import TimeElapsedColumn

from headwise.progress import bar, plain_console, text_column
from headwise.results.rows import Row
from headwise.training.comparison import ComparisonRun, Task, Training
from headwise.training.directory import RunDirectory
from headwise.training.measures import measures
from headwise.training.record import Trained

Result = TypeVar("Result", Trained, Trained | None)
Train = Callable[..., Result]


def side_by_side(
    train: Train[Result], run: ComparisonRun, task: Task, trainings: Sequence[Training]
) -> list[Result]:
    """`train(run, task, training)` for each of them, as many at a time as the run has workers.

    A process has a GPU of its own, or its share of the threads. What it prints goes to a file in
    `logs/` of the run's directory. It ends with this one, however that ends.

    Raises:
        FloatingPointError, OSError, ValueError: What the training of a model ended with. Others are
            stopped; their checkpoints and the finished models stay.
    """
    if not trainings:
        return []
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(run.workers):
        numbers.put(number)
    threads = max(1, torch.get_num_threads() // run.workers)
    pool = ProcessPoolExecutor(
        run.workers, context, initializer=_set_up, initargs=(numbers, _gpus(), threads)
    )
    with TemporaryDirectory(prefix="headwise-") as folder:
        # The data goes by a file. Python before 3.11.5 waits without end where a process is killed
        # before it has read what is more than a pipe holds.
        shared = Path(folder, "task.pickle")
        with shared.open("wb") as file:
            pickle.dump((train, run, task), file)
        futures: list[Any] = [pool.submit(_work, shared, training) for training in trainings]
        try:
            _follow(futures, [training.label for training in trainings])
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def _follow(futures: Sequence[Future[Result]], names: Sequence[str]) -> None:
    """A bar, and a line for each model that is finished, until all are."""
    began, total = time.perf_counter(), len(futures)
    console = plain_console()
    columns = TimeElapsedColumn(), text_column("{task.fields[left]}")
    with bar(console, *columns, disable=not console.is_terminal) as shown:
        task = shown.add_task("models", total=total, left="")
        for done, future in enumerate(as_completed(futures), start=1):
            name = names[futures.index(future)]
            result = _result(future, name)
            minutes = (time.perf_counter() - began) / 60 / done * (total - done)
            left = f"{minutes:.0f} min left" if done < total else ""
            scores = "diverged" if result is None else _scores(result.row)
            shown.update(task, advance=1, left=left)
            line = f"{done}/{total}  {name}  {scores}  {left}"
            console.print(line, soft_wrap=True)


def _scores(row: Row) -> str:
    return "  ".join(f"{m.column[:-2]} {row[m.key]:.1f}" for m in measures(row))


def _result(future: Future[Result], name: str) -> Result:
    """What a model came to, or what its training ended with, naming the model."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise OSError(
            f"{name} or a model beside it was killed, out of memory perhaps; the same command with "
            "--resume goes on, fewer --workers need less"
        ) from error
    except (FloatingPointError, OSError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _set_up(numbers: Any, gpus: list[str], threads: int) -> None:
    """What a process does before its first model."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpus:
        # Before anything asks for a device: afterwards it would have no effect.
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[numbers.get() % len(gpus)]
    torch.set_num_threads(threads)
    PartialState(cpu=not torch.accelerator.is_available())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(shared: Path, training: Training) -> Trained | None:
    train, run, task = _read(shared)
    log = RunDirectory(run.output).log(training.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    return train(run, task, training)


@cache
def _read(shared: Path) -> tuple[Train[Trained | None], ComparisonRun, Task]:
    with shared.open("rb") as file:
        train, run, task = pickle.load(file)
    return train, run, task
