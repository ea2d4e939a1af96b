import pytest

from headwise.analysis.spread import with_spread


@pytest.mark.parametrize(
    ("values", "text"),
    [([], "–"), ([1.5], "1.50"), ([1.5, 1.5], "1.50"), ([1.0, 2.0, 3.0], "2.00 ± 1.00")],
)
def test_mean_and_deviation(values, text):
    assert with_spread(values, "{:.2f}") == text


def test_the_deviation_may_have_a_format_of_its_own():
    assert with_spread([98.0, 99.0, 100.0], "{:.1f} %", "{:.2g}") == "99.0 % ± 1"
