"""The figure of what a model loses with heads."""

import pytest

from headwise.analysis.plots import quality_against_share


def test_a_line_for_each_conversion_through_the_means():
    lines = {"fitted": {0.5: [1.4], 1.0: [1.0]}, "fitted, tuned": {0.5: [0.8, 1.0]}}
    (axes,) = quality_against_share(lines, title="a model").axes
    drawn = {x.get_label(): x.get_xydata().tolist() for x in axes.get_lines()[1:]}
    assert drawn["fitted"] == [[0.5, 1.4], [1.0, 1.0]]
    assert drawn["fitted, tuned"] == [[0.5, pytest.approx(0.9)]]
    assert axes.get_title("left") == "a model"


def test_the_axis_says_how_much_more():
    (axes,) = quality_against_share({"a": {0.5: [0.9]}}, title="a model").axes
    axes.figure.canvas.draw()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["-10 %", "0 %", "+10 %", "+25 %", "+50 %", "+100 %", "+200 %"]
