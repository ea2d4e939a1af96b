"""Errors of headwise's own, and what every other error becomes while a user's file is read."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class HeadwiseError(Exception):
    """What all errors have in common that have a class of their own here.

    A wrong argument is a plain ValueError that names the field.
    """


class UnreadableError(HeadwiseError, ValueError):
    """A file or directory of the user's that cannot be read, by name."""


class DivergedError(HeadwiseError, FloatingPointError):
    """A training whose loss or gradient is not finite."""


@contextmanager
def reading(path: str | Path, kind: str = "", *, hint: str = "") -> Iterator[None]:
    """While a user's file is read: whatever is raised names it.

    A file can be wrong in as many ways as its readers have kinds of errors. Too little memory is
    not the file's fault, and an error of our own has named what is wrong already.

    Args:
        path: Of the file or directory.
        kind: What it should be.
        hint: What to do about it.

    Raises:
        UnreadableError: For any other error.
    """
    try:
        yield
    except (MemoryError, HeadwiseError):
        raise
    except Exception as error:
        what = f"{path} cannot be read" + (f" as {kind}" if kind else "")
        advice = f"; {hint}" if hint else ""
        raise UnreadableError(f"{what}: {reason(error).rstrip('.')}{advice}") from error


def reason(error: BaseException, *, first_line: bool = False) -> str:
    """What an error says, in a line; its kind too where that is not said in words for people.

    Args:
        error: Of any kind.
        first_line: Whether the lines after the first are left out, unless it ends in a colon:
            transformers lists there all classes that it has.
    """
    text = str(getattr(error, "strerror", None) or error)
    said = in_a_line(re.split(r"(?<!:)\n", text)[0] if first_line else text)
    if isinstance(error, KeyError) and said:
        return f"it has no {said}"
    if isinstance(error, ValueError | OSError | HeadwiseError) and said:
        return said
    kind = type(error).__name__
    return f"{kind}: {said}" if said else kind


def in_a_line(text: object) -> str:
    """Text in one line; what is no letter or sign for people is escaped."""
    line = " ".join(str(text).split())
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in line)
