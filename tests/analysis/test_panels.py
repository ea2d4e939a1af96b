"""The figure of a comparison: a row a model, or lines over an axis, several where there are."""

import pytest

from headwise.analysis.plots import Panel, Point, comparison


def panel(*points: tuple[str, float | None, float, str]) -> Panel:
    return Panel("code", "Perplexity", [Point(*point) for point in points])


ROUTED, STATIC = "routed", "always the same"
TWO_LINES = panel(
    ("dense", None, 30.0, ""),
    ("MoH, 6", 75, 20.0, ROUTED), ("MoH, 6", 75, 22.0, ROUTED), ("MoH, 4", 50, 25.0, ROUTED),
    ("6 heads", 75, 23.0, STATIC), ("4 heads", 50, 27.0, STATIC),
)  # fmt: skip


def test_each_series_is_a_line_through_its_means():
    (axes,) = comparison([TWO_LINES], axis="heads on (%)").axes
    _, routed, static = axes.lines
    assert list(zip(*routed.get_data(), strict=True)) == [(50, 25.0), (75, 21.0)]
    assert list(zip(*static.get_data(), strict=True)) == [(50, 27.0), (75, 23.0)]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["dense", ROUTED, STATIC, "range over seeds"]


def test_lines_differ_in_more_than_colour():
    (axes,) = comparison([TWO_LINES], axis="heads on (%)").axes
    _, routed, static = axes.lines
    for of in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(routed, of)() != getattr(static, of)()


def test_one_line_needs_no_name():
    bare = panel(("dense", None, 3.0, ""), ("2 heads", 2, 2.0, ""), ("4 heads", 4, 1.0, ""))
    (axes,) = comparison([bare], axis="heads").axes
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["dense", "range over seeds"]
    assert list(axes.lines[1].get_xdata()) == [2, 4]


def test_levels_alone_are_drawn():
    (axes,) = comparison([panel(("dense", None, 3.0, ""))], axis="heads").axes
    assert [line.get_label() for line in axes.lines] == ["dense"]


@pytest.mark.parametrize("axis", [None, "heads"])
@pytest.mark.parametrize(("panels", "size"), [(3, (3, 1)), (4, (4, 1)), (6, (4, 2)), (8, (4, 2))])
def test_four_panels_stand_in_a_line(axis, panels, size):
    one = panel(("dense", None, 3.0, ""), ("2 heads", 2, 2.0, ""))
    figure = comparison([one], axis=axis)
    many = comparison([one] * panels, axis=axis)
    assert len(many.axes) == panels
    across, down = size
    assert tuple(many.get_size_inches()) == pytest.approx(
        (across * figure.get_figwidth(), down * figure.get_figheight())
    )
