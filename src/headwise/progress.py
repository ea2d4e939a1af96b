"""How far a long step is: a bar on a terminal, in a pipe or a log a plain line now and then."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def plain_console() -> Console:
    """A terminal on which text stays as it is.

    Names, paths and prompts may hold what rich's markup means by brackets ("[/INST]") and colons.
    """
    return Console(markup=False, emoji=False, highlight=False)


def text_column(text: str) -> TextColumn:
    """A column of a bar, its text as it is; "{task.description}" stands for a task's."""
    return TextColumn(text, markup=False)


def bar(console: Console, *more: ProgressColumn, **options: Any) -> Progress:
    """A bar with what is done, the bar itself, how many of how many, and more columns."""
    first = text_column("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*first, *more, console=console, **options)


def followed(
    items: Iterable[T],
    title: str,
    *,
    total: int,
    describe: Callable[[T], str] = lambda _: "",
    alike: bool = True,
    shown: bool = True,
) -> Iterator[T]:
    """The items one by one, while it is shown how many are done.

    Args:
        items: What to go through.
        title: What is being done.
        total: How many items there are.
        describe: An item in words, shown while it is worked on.
        alike: Whether items take about equal time, so that the time left can be told.
        shown: False shows nothing, as in all processes but the first.
    """
    console = plain_console()
    if not shown:
        yield from items
        return
    if console.is_terminal:
        left = [TimeRemainingColumn()] if alike else []
        with bar(console, *left, transient=True) as drawn:
            task = drawn.add_task(title, total=total)
            for item in items:
                drawn.update(task, description=_joined(title, describe(item)))
                yield item
                drawn.advance(task)
        return
    # Steps that end before the first line is due print nothing.
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= SECONDS_BETWEEN_LINES:
            last, left_over = now, (now - began) / done * (total - done)
            line = f"{title}  {done}/{total}" + (f"  {left_over:.0f} s left" if alike else "")
            print(_joined(line, describe(item)), flush=True)
        yield item


def _joined(title: str, description: str) -> str:
    return f"{title}  {description}" if description else title
