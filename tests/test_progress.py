"""Progress of long steps where no terminal is there."""

import itertools
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from headwise import progress
from headwise.progress import followed, plain_console


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is four seconds after the one before."""
    monkeypatch.setattr(progress.time, "monotonic", itertools.count(0, 4).__next__)


def test_a_line_is_printed_every_ten_seconds(clock, capsys):
    assert list(followed("abcdefg", "letters", total=7, describe=str.upper)) == [*"abcdefg"]
    # Looks at 4, 8, 12 s: the third is the first that is ten seconds after the beginning.
    assert capsys.readouterr().out.splitlines() == [
        "letters  2/7  30 s left  C",
        "letters  5/7  10 s left  F",
    ]


def test_no_time_is_told_for_items_that_differ(clock, capsys):
    assert list(followed("abc", "letters", total=3, alike=False)) == [*"abc"]
    assert capsys.readouterr().out == "letters  2/3\n"


def test_short_steps_and_other_processes_print_nothing(clock, capsys):
    assert list(followed("ab", "letters", total=2)) == [*"ab"]
    assert list(followed("abcdefg", "letters", total=7, shown=False)) == [*"abcdefg"]
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar_that_names_the_item(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(followed("ab", "letters", total=2, describe=str.upper)) == [*"ab"]
    assert "letters  B" in capsys.readouterr().out


def test_text_of_the_users_is_no_markup(capsys, monkeypatch):
    """Nothing that anybody may call a model, a file or a prompt is taken for markup."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    name = "[/INST] [red]a[/b] :smile: \\["
    table = Table(name, title=name, caption=name, min_width=60)
    table.add_row(name)
    plain_console().print(name, table)
    assert list(followed("a", name, total=1, describe=lambda _: name))
    shown = Text.from_ansi(capsys.readouterr().out).plain
    bars = 2 if int(version("rich").split(".")[0]) >= 15 else 3  # as one line ends, drawn once more
    assert shown.count(name) == 1 + 4 + bars


def test_consoles_and_columns_of_text_are_made_in_one_place():
    sources = Path(progress.__file__).parent.rglob("*.py")
    makers = {p.name for p in sources if re.search(r"\b(Console|TextColumn)\(", p.read_text())}
    assert makers == {"progress.py"}
