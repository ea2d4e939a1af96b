"""Arguments of the command line, as tyro reads them; what it refuses, as all that we refuse."""

import argparse
import contextlib
import functools
import io
import itertools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import tyro
from rich.text import Text

T = TypeVar("T")


def parsed(kind: type[T], argv: list[str], command: str, default: T | None = None) -> T:
    """A run out of arguments, those that are not given out of the default."""
    # The class checks its values at the end: tyro would put what it says in a box.
    members = {"__doc__": _plain(kind.__doc__ or ""), "__post_init__": lambda _: None}
    unchecked: Any = type(kind.__name__, (kind,), members)
    defaults = {} if default is None else {"default": unchecked(**vars(default))}
    given = vars(_read(unchecked, argv, command, **defaults))
    for name, value in given.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{name} is {number}; it must fit into 64 bits")
    return kind(**given)


def called(function: Callable[..., None], argv: list[str], command: str) -> None:
    """Call a function with arguments from the command line."""

    @functools.wraps(function)
    def arguments(**given: Any) -> dict[str, Any]:
        return given

    function(**_read(arguments, argv, command))


def _read(form: Any, argv: list[str], command: str, **options: Any) -> Any:
    """What tyro makes of the arguments; what it refuses is a ValueError, as all that we refuse."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(form, args=argv, prog=command, **options)
    except SystemExit as end:
        if not end.code:
            raise
    raise ValueError(_in_a_line(box.getvalue()))


def _in_a_line(box: str) -> str:
    """What is wrong and what may have been meant, of all that tyro says in a box."""
    lines = [line[2:].rstrip(" │") for line in Text.from_ansi(box).plain.splitlines()[1:-1]]
    # Rules part what is wrong, what was meant and where help is; what stands far in is help, too.
    wrong, *others = (
        " ".join(line.strip() for line in part if not line.startswith(8 * " "))
        for is_rule, part in itertools.groupby(lines, lambda line: not line.strip(" ─-"))
        if not is_rule
    )
    return "; ".join([wrong, *(x for x in others if x.startswith(("Perhaps", "Arguments sim")))])


def _plain(docstring: str) -> str:
    """For a terminal, without the marks that its first words have for readers of the code."""
    return re.sub(r"\*\*(\w+)\*\*", r"\1", docstring)


def first_field(name: str, default: str, argv: list[str]) -> tuple[str, list[str]]:
    """A field that says what the others default to, read before them, and what is left."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default)
    chosen, rest = parser.parse_known_args(argv)
    return getattr(chosen, name), rest
