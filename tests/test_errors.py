"""Errors of our own, and what every other error becomes while a user's file is read."""

import pickle
from pathlib import Path

import pytest

from headwise.errors import DivergedError, HeadwiseError, UnreadableError, in_a_line, reading
from headwise.ops.native.kernel_file import NoKernelsError


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (UnreadableError, ValueError),
        (DivergedError, FloatingPointError),
        (NoKernelsError, RuntimeError),
    ],
)
def test_errors_of_our_own_have_one_base_and_travel_between_processes(kind, also):
    error = pickle.loads(pickle.dumps(kind("why")))
    assert isinstance(error, HeadwiseError)
    assert isinstance(error, also)
    assert str(error) == "why"


@pytest.mark.parametrize(
    ("raised", "why"),
    [
        (ValueError("no JSON\nat all"), "no JSON at all"),
        (OSError(21, "Is a directory", "x"), "Is a directory"),
        (OSError("it is gone"), "it is gone"),
        (KeyError("models"), "it has no 'models'"),
        (TypeError(), "TypeError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
    ],
)
def test_what_a_file_is_read_with_may_raise_anything(raised, why):
    with pytest.raises(UnreadableError) as caught, reading(Path("a/b.json")):
        raise raised
    assert str(caught.value) == f"a/b.json cannot be read: {why}"
    assert caught.value.__cause__ is raised


def test_what_it_should_be_and_what_to_do_are_said():
    message = r"^x cannot be read as an image: odd; mend it$"
    with pytest.raises(UnreadableError, match=message), reading("x", "an image", hint="mend it"):
        raise ValueError("odd")


@pytest.mark.parametrize("raised", [MemoryError(), KeyboardInterrupt(), UnreadableError("y")])
def test_what_is_not_the_files_fault_or_named_already_passes(raised):
    with pytest.raises(type(raised)) as caught, reading("x"):
        raise raised
    assert caught.value is raised


def test_a_line_holds_nothing_that_moves_the_cursor():
    assert in_a_line(" a\n\n b\t\x1b[2K\udcff ü") == r"a b \x1b[2K\udcff ü"
