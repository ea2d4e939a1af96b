"""Fields and arguments against their annotations: what fits, and what is said of the rest."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from headwise.ops.fields import (
    Count,
    Index,
    Positive,
    Range,
    Share,
    Weight,
    check,
    check_fields,
    checked,
)

Rate = Annotated[float, Range(0, below=1)]


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (7, Count), (0, Index), (2**63 - 1, int), (1, Share), (0.5, Share), (3, Positive),
        (1e-300, Positive), (0, Weight), (np.float64(0.5), float), (0.99, Rate), (True, bool),
        ("a", Literal["a", "b"]), (None, Count | None), ((2, 3), tuple[Count, ...]),
        ([2, 3], Sequence[Count]), ((2, 0.5), tuple[Count, Share]), ([[1], 0.5], list[Any]),
        ({"a": 2}, Mapping[str, Count]), (len, Callable[[str], int]), (object(), Any),
        ([2, [0, 1]], Sequence[Count | Sequence[Index]]), ([], list[Count]), ("", str),
    ],
)  # fmt: skip
def test_what_fits_passes(value, hint):
    check("field", value, hint)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (0, Count, "field is 0; it must be at least 1"),
        (True, Count, "field is True; it must be an int of at least 1"),
        (1.0, int, "field is 1.0; it must be an int"),
        (2**63, int, "field is 9223372036854775808; it must be an int"),
        (np.int64(3), Count, "it must be an int of at least 1"),
        (torch.tensor(3), Count, "field is tensor(3); it must be an int of at least 1"),
        (1.5, Share, "field is 1.5; it must lie in 0..1"),
        (math.nan, Share, "field is nan; it must be a number in 0..1"),
        (math.inf, float, "field is inf; it must be a number"),
        (0, Positive, "field is 0; it must be above 0"),
        (1, Rate, "field is 1; it must be at least 0 and below 1"),
        ("x", Rate, "field is 'x'; it must be a number of at least 0 and below 1"),
        (1, bool, "field is 1; it must be True or False"),
        ("c", Literal["a", "b"], "field is 'c'; it must be one of 'a', 'b'"),
        (True, Literal[1, 2], "field is True; it must be one of 1, 2"),
        ([], Literal["a", "b"], "field is []; it must be one of 'a', 'b'"),
        (0, Count | None, "field is 0; it must be an int of at least 1 or None"),
        ((2, 0), tuple[Count, ...], "field[1] is 0; it must be at least 1"),
        ((2,), tuple[Count, Share], "field is (2,); it must be a tuple of 2 entries"),
        ([1, [0, -1]], Sequence[Count | Sequence[Index]], "field[1][1] is -1; it must be at"),
        ("abc", Sequence[str], "field is 'abc'; it must be a list (each a string)"),
        ({"a": 0}, Mapping[str, Count], "field['a'] is 0; it must be at least 1"),
        (3, Callable[[str], int], "field is 3; it must be a function"),
        (None, dict, "field is None; it must be a dict"),
        ("x" * 999, int, f"field is '{'x' * 79}…; it must be an int"),
    ],
)
def test_what_does_not_fit_is_named(value, hint, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check("field", value, hint)


@dataclass(frozen=True)
class Base:
    width: Count
    share: Share = 0.5
    found: list[int] = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Derived(Base):
    kind: "Literal['a', 'b']" = "a"


def test_a_dataclass_is_checked_with_the_fields_that_it_inherits():
    assert Derived(7, kind="b").width == 7
    for fields in ({"width": 0}, {"width": 7, "share": 2}, {"width": 7, "kind": "c"}):
        name = list(fields)[-1]
        with pytest.raises(ValueError, match=f"^{name} is "):
            Derived(**fields)


@checked
def scale(x: Any, by: Weight = 1.0, *rest: Count, times: Count = 1, **options: Count) -> Any:
    """Doc."""
    return x, by, rest, times, options


def test_a_function_is_checked_and_stays_what_it_was():
    assert scale(3) == (3, 1.0, (), 1, {})
    assert scale(3, 0, 5, times=2, other=-1) == (3, 0, (5,), 2, {"other": -1})
    assert (scale.__name__, scale.__doc__) == ("scale", "Doc.")
    with pytest.raises(ValueError, match=r"^by is -1; it must be at least 0$"):
        scale(3, -1)
    with pytest.raises(ValueError, match=r"^times is None; it must be an int of at least 1$"):
        scale(3, times=None)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        scale()
