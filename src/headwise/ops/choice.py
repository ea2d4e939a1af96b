"""Arguments that are one of a few names: one check and one message for all of them."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

T = TypeVar("T")


def check_choice(field: str, value: object, choices: Any) -> None:
    """Refuse a value that the Literal `choices` does not hold."""
    if value not in get_args(choices):
        known = ", ".join(map(repr, get_args(choices)))
        raise ValueError(f"{field} is {value!r}; it must be one of {known}")


def look_up(kind: str, name: str, known: Mapping[str, T], *, listed: bool = False) -> T:
    """The entry of that name.

    Raises:
        ValueError: If there is none, with the nearest name; with all names where none is near, or
            where `listed`.
    """
    if name in known:
        return known[name]
    near, names = difflib.get_close_matches(str(name), known, n=1), ", ".join(known)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {names}"
    more = f" There are {names}" if near and listed else ""
    raise ValueError(f"unknown {kind} {name!r}; {hint}{more}")
