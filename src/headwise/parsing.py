"""Arguments of the command line, as tyro reads them; what it refuses, as all that we refuse."""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import re
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import tyro
from rich.text import Text

from headwise.ops.fields import describe

T = TypeVar("T")


def parsed(kind: type[T], argv: list[str], command: str, default: T | None = None) -> T:
    """A run out of arguments, those that are not given out of the default.

    Args:
        kind: A dataclass. If it names its `everyday` fields, help shows these first and the others
            in a group for each class that declares them.
        argv: The arguments.
        command: What they were given to.
        default: Where the values of other fields come from; without it the fields' own defaults.
    """
    given = vars(_read(_form(kind, default), argv, command, kind))
    for group in given.keys() - get_type_hints(kind):
        given |= vars(given.pop(group))
    for name, value in given.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -(2**63) <= number < 2**63:
                raise ValueError(f"{name} is {number}; it must fit into 64 bits")
    return kind(**given)


_ATTRIBUTES = "Attributes:\n"


def _form(kind: Any, default: Any) -> Any:
    """The fields of a run in groups, as dataclasses that check nothing.

    The run's own class checks its values at the end: what it says there tyro would put in a box.
    """
    hints, everyday = get_type_hints(kind, include_extras=True), getattr(kind, "everyday", None)
    classes: list[Any] = [c for c in kind.__mro__ if dataclasses.is_dataclass(c)]
    # tyro looks a field up in the docstring of the class that it is in; the last entry counts.
    documents = [(c.__doc__ or "").partition(_ATTRIBUTES)[2].rstrip() for c in reversed(classes)]

    def of(name: str, about: str, fields: list[Any]) -> Any:
        form: Any = dataclasses.make_dataclass(name, fields, kw_only=True, frozen=True)
        form.__doc__ = _plain("\n".join([f"{about}\n\n{_ATTRIBUTES}", *documents]))
        return form

    flat = tyro.conf.configure(tyro.conf.OmitArgPrefixes)
    first: list[Any] = []
    grouped: dict[Any, list[Any]] = {}
    for each in dataclasses.fields(kind):
        value = each.default if default is None else getattr(default, each.name)
        options = {} if value is dataclasses.MISSING else {"default": value}
        entry = (each.name, hints[each.name], dataclasses.field(**options))
        if everyday is None or each.name in everyday or dataclasses.is_dataclass(entry[1]):
            first.append(entry)
        else:
            owner = next(c for c in reversed(classes) if each.name in c.__annotations__)
            grouped.setdefault(owner, []).append(entry)
    if everyday is not None:
        first.sort(key=lambda entry: (*everyday, entry[0]).index(entry[0]))
    for owner in (c for c in classes if c in grouped):
        # Capitals, which no field has.
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", owner.__name__.removesuffix("Run"))
        group = of(owner.__name__, (owner.__doc__ or "").partition("\n\n")[0], grouped[owner])
        first.append((name, flat(group)))
    return of(kind.__name__, (kind.__doc__ or "").partition(_ATTRIBUTES)[0].strip(), first)


def called(function: Callable[..., None], argv: list[str], command: str) -> None:
    """Call a function with arguments from the command line."""

    @functools.wraps(function)
    def arguments(**given: Any) -> dict[str, Any]:
        return given

    function(**_read(arguments, argv, command, function))


def _read(form: Any, argv: list[str], command: str, annotated: Any) -> Any:
    """What tyro makes of the arguments; what it refuses is a ValueError, as all that we refuse.

    `annotated` is the class or function whose annotations say what an argument must be.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(form, args=argv, prog=command)
    except SystemExit as end:
        if not end.code:
            raise
    said = _in_a_line(box.getvalue())
    if misfit := re.match(r"Error parsing --([\w.-]+): [^'\"]*(['\"].*['\"])", said):
        field = misfit[1].replace("-", "_")
        for name in field.split("."):
            annotated = get_type_hints(annotated, include_extras=True)[name]
        said = f"{field} is {misfit[2]}; it must be {describe(annotated)}"
    # What a part of a run, such as tuning's stage "routed", says of its field.
    raise ValueError(re.sub(r"^Error parsing (\w+): (\w+ is )", r"\1.\2", said))


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
