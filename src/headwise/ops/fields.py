"""Fields and arguments checked against their annotations: one check and one message for all.

    @dataclass(frozen=True)                     class Layer(nn.Module):
    class Config:                                   @checked
        width: Count                                def __init__(self, dim: Count, *, std: Weight):
        share: Share = 0.5                              …

        def __post_init__(self) -> None:
            check_fields(self)

A misfit is a ValueError that names the field, the value and what would be right.
What no annotation says, such as that one field divides another, is checked by hand, afterwards.
What torch.compile traces is not checked: it cannot follow annotations.

    int        Python's own, of 64 bits, and no bool. numpy's and torch's are refused, because JSON
               cannot keep them.
    float      the same, or a finite float
    Any        whatever comes, as with every annotation that is not known here
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache, wraps
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from torch.compiler import is_compiling

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = {
    NoneType: "None",
    bool: "True or False",
    int: "an int",
    float: "a number",
    str: "a string",
    Callable: "a function",
}
_LONGEST = 80  # characters of a value that a message shows


class Range(NamedTuple):
    """The range of a number, in `Annotated[int, Range(1)]`.

    Attributes:
        least, most: Bounds that it may reach.
        above, below: Bounds that it may not.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: Any) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def demand(self) -> str:
        """What is asked of a number: "lie in 0..1" or "be at least 0 and below 1"."""
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"lie in {self.least}..{self.most}"
        bounds = {"at least": self.least, "above": self.above}
        bounds |= {"at most": self.most, "below": self.below}
        return f"be {' and '.join(f'{k} {x}' for k, x in bounds.items() if math.isfinite(x))}"

    def __str__(self) -> str:
        demand = self.demand().replace("lie in", "in").replace("be at", "of at")
        return demand.removeprefix("be ")


Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]


def check_fields(config: Any) -> None:
    """Refuse a dataclass with a field that is not what its annotation says.

    Of a class that transformers made a dataclass, only the fields of its own are looked at.
    """
    kind: Any = type(config)
    hints = {} if is_compiling() else _hints_of_class(kind)
    for field in fields(config):
        if field.init and field.name in hints:
            check(field.name, getattr(config, field.name), hints[field.name])


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which refuses an argument that is not what its annotation says."""
    signature = inspect.signature(function)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        hints = {} if is_compiling() else _hints(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            # Python's own message names a keyword that there is not before one that is missing.
            return function(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints and signature.parameters[name].kind not in several:
                check(name, value, hints[name])
        return function(*args, **kwargs)

    return call


def check(field: str, value: object, hint: Any) -> None:
    """Refuse a value that is not what the annotation says."""
    if not is_compiling() and (misfit := next(_misfits(field, value, hint), None)):
        name, wrong, right = misfit
        shown = " ".join(repr(wrong).split())
        shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
        raise ValueError(f"{name} is {shown}; it must {right}")


@cache
def _hints(function: Any) -> dict[str, Any]:
    return inspect.get_annotations(inspect.unwrap(function), eval_str=True)


@cache
def _hints_of_class(kind: type) -> dict[str, Any]:
    """Of the fields that classes outside transformers declare, whose own name what is not there."""
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] != "transformers":
            hints |= inspect.get_annotations(base, eval_str=True)
    return hints


def _misfits(field: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, value and demand of what does not fit: an entry, or the whole."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        if list(_misfits(field, value, parts[0])):
            yield field, value, f"be {describe(hint)}"
        else:
            outside = (m for m in parts[1:] if isinstance(m, Range) and value not in m)
            yield from ((field, value, mark.demand()) for mark in outside)
    elif kind in (Union, UnionType):
        of_each = []
        for part in parts:
            of_each += (some := list(_misfits(field, value, part)))
            if not some:
                return
        entries = [misfit for misfit in of_each if misfit[0] != field]
        yield from entries or [(field, value, f"be {describe(hint)}")]
    elif not _is_of_kind(value, hint if kind is None else kind, parts):
        yield field, value, f"be {describe(hint)}"
    elif kind in (list, tuple, Sequence):
        alike = kind is not tuple or parts[1:] == (...,)
        of_entries = [parts[0]] * len(value) if alike else parts
        for i, (entry, part) in enumerate(zip(value, of_entries, strict=True)):
            yield from _misfits(f"{field}[{i}]", entry, part)
    elif kind in (dict, Mapping):
        for key, entry in value.items():
            yield from _misfits(f"{field}[{key!r}]", entry, parts[1])


def _is_of_kind(value: Any, kind: Any, parts: tuple[Any, ...]) -> bool:
    """Whether it is of that type, whatever is inside."""
    if kind is Literal:
        return any(value is x or (type(value) is type(x) and value == x) for x in parts)
    if kind in (int, float) and isinstance(value, int):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    if kind is float:
        return isinstance(value, float) and math.isfinite(value)
    if kind is Sequence:
        return isinstance(value, list | tuple)
    if kind is tuple and parts and ... not in parts:
        return isinstance(value, tuple) and len(value) == len(parts)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def describe(hint: Any) -> str:
    """What a value of that annotation is, for people: "an int of at least 1 or None"."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return " ".join([describe(parts[0]), *(str(m) for m in parts[1:] if isinstance(m, Range))])
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(describe, parts)))
    if kind is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if kind is tuple and ... not in parts:
        return f"a tuple of {len(parts)} entries"
    if kind in (list, tuple, Sequence):
        whole, entry = "list" if kind is Sequence else kind.__name__, describe(parts[0])
        return f"a {whole}" + f" (each {entry})" * (parts[0] is not Any and len(entry) < 30)
    known = hint if kind is None else kind
    name = str(getattr(known, "__name__", known))
    return _NAMES.get(known) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
