"""Tables: how numbers are printed, and which of them are marked."""

import pytest

from headwise.results.table import Number, Table, mean


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "–"), ([1.5], "1.50"), ([1.5, 1.5], "1.50"), ([1.0, 2.0, 3.0], "2.00 ± 1.00")],
)
def test_mean_and_deviation(values, text):
    assert str(mean(values, "{:.2f}")) == text


def test_the_deviation_may_have_a_form_of_its_own():
    assert str(mean([98.0, 99.0, 100.0], "{:.1f} %", "{:.2g}")) == "99.0 % ± 1"


def test_a_number_stays_what_it_is_until_it_is_printed():
    number = mean([1.0, 2.0], "{:.0f} tokens", note=" (1–2)")
    assert (number.value, number.spread) == (1.5, 0.5**0.5)
    assert str(number) == "2 tokens ± 1 tokens (1–2)"


@pytest.mark.parametrize("form", ["{0.__class__}", "{:999999999}", "{}{}", "{:.2f", "{:d}", "{x}"])
def test_a_form_prints_one_number_and_does_nothing_else(form):
    with pytest.raises(ValueError, match=r"form is .*; it must be as"):
        Number(1.0, form)
    with pytest.raises(ValueError, match="spread_form is"):
        Number(1.0, spread_form=form)


@pytest.mark.parametrize(
    ("column", "cells", "marked"),
    [
        ("a ↓", [Number(1.5, "{}", 0.02), Number(1.51, "{}", 0.01), Number(1.6)], {0, 1}),
        ("a ↑", [Number(1.5, "{}", 0.02), Number(1.51, "{}", 0.01), Number(1.6)], {2}),
        ("a", [Number(1.5, "{}", 0.02), Number(1.51, "{}", 0.01)], set()),
        ("a ↓", [Number(-2.0, "{}", 0.5), Number(1e3), "n/a"], {0}),
        ("a ↓", [Number(-2.0), Number(1e3)], set()),
        ("a ↓", [Number(1.0, "{}", 0.5), "n/a"], set()),
    ],
)
def test_the_best_are_all_within_the_spread(column, cells, marked):
    table = Table(["", column], [["a", cell] for cell in cells])
    assert table.best() == {(row, 1) for row in marked}


def test_markdown():
    table = Table(["a", "b"], [["x", Number(1234, "{:,}")]], "A legend.", "an abacus")
    assert table.markdown() == (
        "| a | b |\n| --- | ---: |\n| x | 1,234 |\n\nA legend.\nMeasured on an abacus.\n"
    )
